from __future__ import annotations

import pytest
import yaml

from recipes.cli.train import CONFIGS
from recipes.data.segmentation_sets import SETS
from recipes.tasks.segmentation import Config, Segmentation
from recipes.training.config import make_model
from recipes.training.methods import make_optimizer
from recipes.training.options import configuration
from zoo.networks.segmentation import labels_pixels

NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if yaml.safe_load(path.read_text()).get("recipe") == "segmentation"
)


def read(name):
    return configuration(Config, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


def test_both_sets_have_a_baseline_and_posteriors_that_go_on_from_it():
    assert NAMES == [
        "camvid/unet_adamw",
        "camvid/unet_adamw_ivon",
        "camvid/unet_adamw_vogn",
        "cityscapes/unet_adamw",
        "cityscapes/unet_adamw_ivon",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_holds_the_rules_and_its_network_fits_its_data(name):
    config = read(name)
    Segmentation(config).check()
    model = make_model(config)
    assert labels_pixels(model.card) and config.model["num_classes"] == len(SETS[config.data].labels.classes)
    make_optimizer(config.optimizer, model, 100, 0)
    if config.start is not None:
        baseline = read(name.rpartition("_")[0])
        assert config.start == f"runs/{baseline.name}" and config.half
        for field in ("model", "augmentation", "class_balance", "batch_size", "data", "validation"):
            assert getattr(config, field) == getattr(baseline, field)
