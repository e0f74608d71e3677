"""A folder in the layout of Cityscapes trains end to end; CamVid's has a split for validation of its own."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.scenes import write_camvid, write_cityscapes
from support.tiny import quick
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.storage.posterior import read_card, read_posterior
from recipes.cli import main
from recipes.data.augmentation import SceneAugmentation
from recipes.data.segmentation_files import IGNORED
from recipes.data.segmentation_sets import CITYSCAPES_CLASSES, load_scenes
from recipes.data.slices import load_slice, write_scene_slice
from recipes.reports.compare import compare
from recipes.reports.measure import EvaluationRequest
from recipes.reports.verify import record, verify
from recipes.tasks.evaluate import evaluate, task_of
from recipes.tasks.segmentation import Config, Segmentation
from recipes.training.config import Evaluation
from recipes.training.loop import Training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    quick(monkeypatch)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_cityscapes(tmp_path_factory.mktemp("cityscapes"), size=(16, 32))


def config(root, folder, **fields):
    given = Config(
        name="streets",
        model={"name": "unet_small", "width": 2, "num_classes": 19, "input_size": [3, 16, 32]},
        data="cityscapes",
        data_root=str(root),
        augmentation=SceneAugmentation([16, 24], [0.8, 1.2], True, 0.1, 0.1),
        optimizer={"name": "ivon", "lr": 1.0, "hess_init": 0.1, "temperature": 0.003},
        batch_size=2,
        epochs=8,
        evaluation=Evaluation(num_samples=4, epoch_samples=1, batch_size=2),
        output=str(folder),
        device="cpu",
    )
    return dataclasses.replace(given, **fields)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        metrics = Segmentation(config(root, folder)).train(command="bayeslayers train cityscapes/unet")
    return folder, metrics


def rows_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def test_a_folder_in_the_layout_of_cityscapes_trains_end_to_end(whole):
    folder, metrics = whole
    assert {path.name for path in folder.iterdir()} == set(
        "best checkpoint.safetensors config.json curves.png log.csv metrics.json posterior report.html "
        "report.json".split()
    )
    assert metrics == json.loads((folder / "metrics.json").read_text())
    # Three classes in equal parts would be a third right.
    assert 0.7 < metrics["accuracy"] <= 1 and 0.4 < metrics["miou"] <= 1 and 0 < metrics["nll"] < 0.9
    assert 0.5 < metrics["misclassification_auroc_entropy"] <= 1 and metrics["test_examples"] == 3
    first, *_, last = rows_of(folder)
    assert {"train_loss", "train_accuracy", "train_miou", "test_miou", "test_nll", "test_ece", "lr"} <= first.keys()
    assert last["train_loss"] < 0.6 * first["train_loss"] and last["train_miou"] > first["train_miou"]


def test_its_card_says_what_is_ignored_and_predicts_what_was_measured(whole, root):
    folder, metrics = whole
    card, model = read_card(folder / "posterior"), zoo.load(folder / "posterior")
    assert card.likelihood_parameters == {"ignore_index": IGNORED} and card.class_names == list(CITYSCAPES_CLASSES)
    assert card.dataset == "cityscapes (8 train, 3 test)"
    test = load_scenes("cityscapes", root, "test")
    prediction = bl.predict(model, test.inputs(slice(None)), 16, generator=torch.Generator().manual_seed(1))
    counted = test.targets[:] != IGNORED
    right = (prediction.labels == test.targets[:])[counted].float().mean()
    assert_close(float(right), metrics["accuracy"], rtol=0, atol=0.03)


def test_its_report_shows_panels_and_the_classes(whole):
    page = (whole[0] / "report.html").read_text()
    for text in ("Intersection over union: road ", "Panels of uncertainty", "Accuracy against confidence", "miou"):
        assert text in page
    assert "most confident mistakes" not in page


def test_it_is_evaluated_as_the_run_measured_it(whole, root):
    folder, metrics = whole
    assert task_of(read_card(folder / "posterior")) is Segmentation
    request = EvaluationRequest(str(folder / "posterior"), num_samples=4, batch_size=250)
    result = evaluate(request, root)
    assert result.request.batch_size == Segmentation.largest_batch  # memory holds a few pictures
    assert_close(result.evaluation.metrics["miou"], metrics["miou"], rtol=0, atol=0.05)
    assert result.evaluation.class_iou.shape == (19,)
    with pytest.raises(ValueError, match="ood must be left out for segmentation, got svhn"):
        evaluate(dataclasses.replace(request, ood=["svhn"]), root)
    with pytest.raises(ValueError, match=r"data must have the posterior's classes, road, .*, got those of camvid: sky"):
        evaluate(dataclasses.replace(request, data="camvid"), write_camvid(folder.parent / "other"))


def test_a_posterior_of_images_is_measured_by_their_task():
    card = read_card(zoo.resolve("mlp-mnist"))
    assert task_of(card).name == "classification"
    assert "for each pixel" in Segmentation.refusal(card)


def test_it_is_verified_on_pictures_and_on_a_slice(whole, root, monkeypatch, tmp_path):
    folder = whole[0]
    monkeypatch.setattr("recipes.reports.verify.RESAMPLES", 8)
    checks = verify(folder / "posterior", root)
    assert {check.metric for check in checks} >= {"miou", "nll", "ece", "misclassification_auroc_entropy"}
    assert all(check.ok for check in checks)
    monkeypatch.setattr("recipes.data.slices.SLICES", tmp_path / "slices")
    write_scene_slice("cityscapes", (12, 24), 2, root)
    known = load_slice("cityscapes", [3, 16, 32])
    assert known.images.shape == (2, 3, 12, 24) and known.targets.shape == (2, 12, 24)
    assert IGNORED in known.targets.unique().tolist()
    model = zoo.load(folder / "posterior")
    bl.save_posterior(model, tmp_path / "copy", name="streets", half=True)
    card = record(tmp_path / "copy")
    assert {"miou", "accuracy", "nll", "brier", "ece", "kl", "nll_at_means"} <= card.verification.keys()
    assert read_posterior(tmp_path / "copy").half  # a record does not change how it is stored
    checks = verify(tmp_path / "copy")
    assert len(checks) > 8 and all(check.ok for check in checks)


def test_runs_are_compared_by_miou(whole, root, tmp_path):
    Segmentation(config(root, tmp_path / "adam", optimizer={"name": "adam", "lr": 0.01}, epochs=2)).train()
    comparison = compare([whole[0], tmp_path / "adam"])
    assert [row["method"] for row in comparison.rows()] == ["ivon", "adam"]
    table = comparison.to_markdown()
    assert "mIoU" in table and "pixel accuracy" in table and not (tmp_path / "adam/posterior").exists()


def test_it_is_stopped_by_ctrl_c_and_resumed_bit_for_bit(whole, root, tmp_path, capsys):
    step, count = Training._step, iter(range(1, 99))

    def pressed(self, x, y):
        step(self, x, y)
        if next(count) == 6:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_step", pressed)
        assert Segmentation(config(root, tmp_path / "run")).train() is None
    assert "stopped and saved in epoch 2" in capsys.readouterr().err
    command = "bayeslayers train cityscapes/unet"
    assert Segmentation(config(root, tmp_path / "run")).train(resume=True, command=command) == whole[1]
    assert rows_of(tmp_path / "run") == rows_of(whole[0])
    found, expected = (load_file(run / "posterior/model.safetensors") for run in (tmp_path / "run", whole[0]))
    assert_close(found, expected, rtol=0, atol=0)


def test_camvid_is_measured_on_its_own_validation_split_after_each_epoch(tmp_path):
    root = write_camvid(tmp_path / "data")
    model = {"name": "unet_small", "width": 2, "num_classes": 11, "input_size": [3, 36, 48]}
    given = config(root, tmp_path / "run", data="camvid", model=model, epochs=1, half=True, class_balance=0.5)
    metrics = Segmentation(given).train()
    assert "val_miou" in rows_of(tmp_path / "run")[0] and metrics["test_examples"] == 2
    card = read_card(tmp_path / "run/posterior")
    weights = card.likelihood_parameters["class_weights"]
    assert len(weights) == 11 and weights[8] > weights[0] and sum(weights) == pytest.approx(11)
    assert read_posterior(tmp_path / "run/posterior").half


def test_it_goes_on_from_a_trained_network(whole, root, tmp_path):
    start = str(whole[0] / "posterior")
    given = config(root, tmp_path / "run", start=start, optimizer={"name": "vogn", "lr": 1e-6}, epochs=1)
    metrics = Segmentation(given).train()
    assert metrics["miou"] > 0.4
    assert read_card(tmp_path / "run/posterior").optimizer["start"] == "posterior"


def test_faults_are_skipped_and_counted_on_request(tmp_path, capsys):
    root = write_cityscapes(tmp_path / "data", size=(16, 32))
    images = sorted((root / "leftImg8bit/train").rglob("*.png"))
    images[2].write_bytes(b"nothing")
    given = config(root, tmp_path / "run", epochs=1, notes="Of a test.")
    with pytest.raises(ValueError, match=f"image must be a picture that Pillow reads, got .*{images[2].name}"):
        Segmentation(given).train()
    metrics = Segmentation(dataclasses.replace(given, on_error="skip")).train()
    said = capsys.readouterr().err
    assert "left out because of faults: 1" in said and images[2].name in said and metrics is not None
    card = read_card(tmp_path / "run/posterior")
    assert card.dataset == "cityscapes (7 train, 3 test)"
    assert card.notes == "Of a test. Pictures left out because of faults: 1."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": "cifar10"}, "data must be a set with a label for each pixel, camvid or cityscapes, got 'cifar10'"),
        ({"data_root": "nowhere"}, "data root must hold the split train of Cityscapes, got no folder nowhere"),
        ({"class_balance": -1.0}, "class_balance must be a finite number >= 0"),
        (
            {"class_balance": 0.5, "class_weights": [1.0] * 19},
            "class_weights must be None where class_balance is given",
        ),
        ({"evaluation": Evaluation(ood=["svhn"])}, "evaluation.ood must be empty for segmentation, got svhn"),
        ({"augmentation": SceneAugmentation([0, 3])}, "augmentation.crop must be a height and a width"),
        (
            {"model": {"name": "unet_small", "width": 2, "num_classes": 3, "input_size": [3, 16, 32]}},
            r"model must have an output for each of 19 classes at each pixel, .* got \(1, 3, 16, 32\)",
        ),
        (
            {"model": {"name": "resnet20", "num_classes": 19, "input_size": [3, 32, 32]}},
            r"model must have an output for each of 19 classes at each pixel, .* got \(1, 19\)",
        ),
        (
            {"model": {"name": "unet_small", "width": 2, "num_classes": 19, "input_size": [1, 16, 32]}},
            "model must take RGB images",
        ),
        ({"class_weights": [1.0] * 3}, "class_weights must have one for each of the 19 classes of cityscapes, got 3"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(fields, message, root, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Segmentation(config(root, tmp_path / "run", **fields)).train()


def test_the_command_line_trains_from_a_file(root, tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    values = dataclasses.asdict(config(root, tmp_path / "run", epochs=1))
    file.write_text(yaml.safe_dump(values))
    assert main(["train", str(file), "--limit", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_examples"] == 3


def test_predict_writes_a_mask_of_the_pictures_size_and_a_panel(whole, root, tmp_path, capsys):
    pictures = sorted((root / "leftImg8bit/val").rglob("*.png"))[:2]
    large = tmp_path / "large.jpg"
    Image.open(pictures[0]).resize((200, 150)).save(large)
    words = ["predict", str(whole[0] / "posterior"), *map(str, pictures), str(large)]
    assert main([*words, "--output", str(tmp_path / "out"), "--num-samples", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3 and {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{stem}-{kind}.png" for stem in (*(path.stem for path in pictures), "large") for kind in ("mask", "panel")
    }
    for row in rows:
        with Image.open(row["mask"]) as mask, Image.open(row["image"]) as image:
            assert mask.size == image.size and mask.mode == "P"
            labels = np.array(mask)
            colour = mask.convert("RGB").getpixel((0, 0))
        shares = np.bincount(labels.ravel(), minlength=19) / labels.size
        assert list(row["classes"].values()) == pytest.approx(shares.tolist(), abs=1e-5)
        assert labels[0, 0] == 10 and colour == (0x46, 0x82, 0xB4)  # sky, in the colour of Cityscapes
        assert 0 < row["total"] < np.log(19) and row["total"] == pytest.approx(
            row["aleatoric"] + row["epistemic"], 1e-3
        )
    assert main([*words[:3], "--output", str(tmp_path / "out"), "--num-samples", "2"]) == 0
    assert "sky" in (said := capsys.readouterr().out) and "written: " in said


def test_predict_bounds_the_memory_of_a_large_picture(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.tasks.predict_scenes._MOST_PIXELS", 500)
    Image.new("RGB", (90, 40)).save(tmp_path / "large.png")
    words = ["predict", str(whole[0] / "posterior"), str(tmp_path / "large.png"), "--output", str(tmp_path), "--json"]
    asked = []
    predict = bl.predict

    def noted(model, x, *args, **kwargs):
        asked.append(x.shape)
        return predict(model, x, *args, **kwargs)

    monkeypatch.setattr(bl, "predict", noted)
    assert main([*words, "--num-samples", "2"]) == 0
    assert asked[0][2] * asked[0][3] <= 500
    with Image.open(tmp_path / "large-mask.png") as mask:
        assert mask.size == (90, 40)
    assert json.loads(capsys.readouterr().out)[0]["classes"]
