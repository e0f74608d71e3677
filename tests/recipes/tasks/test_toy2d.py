from __future__ import annotations

import csv
import dataclasses
import json
import math

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.storage.posterior import read_card
from recipes.cli import main
from recipes.cli.train import CONFIGS
from recipes.data.blobs import OOD_NAME, Blobs
from recipes.data.slices import load_slice
from recipes.reports.verify import record, verify
from recipes.tasks.toy2d import Config, ToyExperiment, log_rows, train
from recipes.training.loop import Training

FILES = {"boundary.gif", "boundary.png", "log.csv", "metrics.json", "posterior"}
VOGN = {"lr": 0.05, "init_precision": 20.0, "num_samples": 3, "vectorise": True}

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(**changes):
    fields = {
        "name": "tiny",
        "data": Blobs(examples=20, test_examples=30),
        "widths": [6],
        "vogn": VOGN,
        "epochs": 3,
        "num_samples": 5,
        "frames": 2,
    }
    return Config(**fields | changes)


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Draw pictures of few points."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.tasks.toy2d._GRID", 20)
        patch.setattr("recipes.tasks.toy2d._DRAWS", 3)
        yield


@pytest.fixture(scope="module")
def run(coarse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    metrics = train(tiny(output=str(folder)), command="bayeslayers train toy2d")
    return folder, metrics


def prepared(config):
    experiment = ToyExperiment(config)
    experiment.prepare(resume=False, command="")
    return experiment


def trained(config):
    experiment = prepared(config)
    experiment.frame = lambda epoch: epoch  # the pictures take longest
    loop = Training(experiment, experiment.plan())
    assert loop.run()
    experiment.rows = log_rows(loop.rows)
    return experiment


def test_a_run_writes_every_file(run):
    folder, metrics = run
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    rows = list(csv.DictReader((folder / "log.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for name in ("adam", "vogn"):
        assert float(rows[-1][f"{name}_nll"]) == metrics[f"{name}_nll"] > 0
        assert float(rows[0][f"{name}_train_loss"]) > 0
    assert "vogn_epistemic" in metrics and "adam_epistemic" not in metrics
    with Image.open(folder / "boundary.png") as last:
        assert last.width > 1200


def test_the_animation_has_the_initial_frame_and_those_asked_for(run):
    with Image.open(run[0] / "boundary.gif") as animation:
        assert animation.n_frames == 1 + 2


@pytest.mark.parametrize(("epochs", "frames", "shown"), [(3, 2, [0, 2, 3]), (4, 4, [0, 1, 2, 3, 4]), (2, 9, [0, 1, 2])])
def test_frames_are_spread_over_the_epochs(epochs, frames, shown):
    assert trained(tiny(epochs=epochs, frames=frames)).frames == shown


def test_the_posterior_loads_and_predicts_probabilities_of_yes(run):
    folder, metrics = run
    model, card = zoo.load(folder / "posterior"), read_card(folder / "posterior")
    test = Blobs(20, 30).split(train=False)
    prediction = bl.predict(model, test.x, 5, generator=torch.Generator().manual_seed(0))
    assert prediction.likelihood == bl.Bernoulli() and prediction.probs.shape == (30, 1)
    nll = torch.nn.functional.binary_cross_entropy(prediction.probs.double(), test.labels.double())
    assert_close(float(nll), metrics["vogn_nll"], rtol=1e-4, atol=0)
    assert card.dataset == "blobs (20 train, 30 test)" and card.dataset_size == 20
    assert card.metrics["nll"] == round(metrics["vogn_nll"], 5)
    assert card.baseline["nll"] == round(metrics["adam_nll"], 5) and card.baseline["optimizer"] == "adam"
    assert card.temperature == pytest.approx(0.01 + 0.99 * 5 / 1000, abs=1e-5)  # the last of 6 steps


def test_the_same_seed_gives_the_same_networks_and_another_seed_others():
    first, second, other = (trained(tiny(epochs=1, seed=seed)) for seed in (0, 0, 1))
    for name in ("adam", "vogn"):
        states = [experiment.models[name].state_dict() for experiment in (first, second, other)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        assert not torch.equal(states[0]["output.weight"], states[2]["output.weight"])
    assert first.rows == second.rows != other.rows


def test_both_start_equal_and_adam_leaves_the_precisions():
    experiment = prepared(tiny())
    adam, vogn = (experiment.models[name].state_dict() for name in ("adam", "vogn"))
    means = [name for name, _ in experiment.models["vogn"].named_parameters()]
    assert all(torch.equal(adam[name], vogn[name]) for name in means)
    start = {name: tensor.clone() for name, tensor in adam.items()}
    experiment.frame = lambda epoch: epoch
    assert Training(experiment, experiment.plan()).run()
    changed = {
        name for name, tensor in experiment.models["adam"].state_dict().items() if not torch.equal(tensor, start[name])
    }
    assert changed == set(means)


def test_draws_at_once_or_in_turn_train_alike():
    at_once, in_turn = (trained(tiny(epochs=2, vogn=VOGN | {"vectorise": v})) for v in (True, False))
    for one, other in zip(at_once.models["vogn"].parameters(), in_turn.models["vogn"].parameters(), strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
    single = trained(tiny(epochs=1, vogn=VOGN | {"num_samples": 1}))
    assert math.isfinite(single.rows[0]["vogn_train_loss"])


def test_blobs_are_those_of_sklearn_folded_into_two_classes():
    from sklearn.datasets import make_blobs

    x, y = make_blobs(100, centers=5, random_state=7)
    points = Blobs().split(train=True)
    assert_close(points.x, torch.tensor(x).float())
    assert_close(points.labels[:, 0], torch.tensor(y % 2))
    test = Blobs().split(train=False)
    for k in range(2):  # the same blobs: the test examples' means are the training examples'
        both = [part.x[part.labels[:, 0] == k].mean(0) for part in (points, test)]
        assert_close(*both, rtol=0, atol=0.6)
    assert not torch.isin(test.x, points.x).any()


def test_only_other_blobs_have_another_name():
    assert Blobs().name == Blobs(examples=20, test_examples=9).name == "blobs"
    assert Blobs(centres=3, seed=1).name == "blobs-centres3-seed1"


def test_bundled_points_are_those_of_the_default_run():
    for name, points in (("blobs", Blobs().split(train=False)), (OOD_NAME, Blobs().ood())):
        bundled = load_slice(name)
        assert_close(bundled.x, points.x, rtol=1e-6, atol=1e-6)
        assert torch.equal(bundled.labels, points.labels)


def test_the_ring_is_outside_the_data():
    x, ring = Blobs().split(train=True).x, Blobs().ood().x
    low, high = x.amin(0), x.amax(0)
    assert ((ring < low) | (ring > high)).any(1).all()
    assert_close(ring.amax(0) - ring.amin(0), 2 * (high - low))


def test_the_bundled_posterior_is_uncertain_away_from_its_data_and_adam_does_not():
    card = read_card(zoo.resolve("mlp-blobs"))
    model = zoo.load("mlp-blobs")
    generator = torch.Generator().manual_seed(3)
    known, ring = (bl.predict(model, load_slice(name).x, 64, generator=generator) for name in ("blobs", OOD_NAME))
    assert ring.total.mean() > 1.5 * known.total.mean()
    assert ring.epistemic.mean() > 1.5 * known.epistemic.mean()
    assert (known.labels == load_slice("blobs").labels).float().mean() > 0.98
    assert card.baseline["total_ring"] < 1.2 * card.baseline["total"]


def test_verify_measures_a_posterior_of_yes_or_no(tmp_path):
    model = zoo.load("mlp-blobs")
    bl.save_posterior(model, tmp_path / "copy", name="mlp-blobs", verification={})
    checks = verify(tmp_path / "copy")  # without a slice's figures and without data, those of the card
    assert {"accuracy", "nll", "ece", "total_ring", "ood_auroc_ring"} <= {check.metric for check in checks}
    assert all(check.ok for check in checks)
    recorded = record(tmp_path / "copy").verification
    assert recorded.keys() == model.card.verification.keys() and recorded["test_examples"] == 500
    bl.save_posterior(model, tmp_path / "copy", name="mlp-blobs", verification=recorded | {"nll": 0.3})
    assert [check.metric for check in verify(tmp_path / "copy") if not check.ok] == ["nll"]


def test_defaults_are_those_of_the_file():
    import yaml

    text = yaml.safe_load((CONFIGS / "toy2d.yaml").read_text())
    assert next(iter(text)) == "recipe"
    text["data"] = Blobs(**text["data"])
    assert dataclasses.replace(Config(**text), notes="") == Config()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"frames": 0}, "frames must be an integer >= 1, got 0"),
        ({"temperature_start": 0.0}, r"temperature_start must be in \(0, 1\], got 0.0"),
        ({"temperature_steps": -1}, "temperature_steps must be a finite number >= 0, got -1"),
        ({"data": Blobs(centres=1)}, "data.centres must be from 2 to the number of examples, got 1"),
        ({"data": Blobs(examples=0)}, "data.examples must be an integer >= 1, got 0"),
        ({"data": Blobs(seed=-1)}, "data.seed must be a finite number >= 0, got -1"),
        ({"widths": [0]}, "must be an integer >= 1, got 0"),
        ({"seed": 10**22}, "seed must be an integer from .*, got 1"),
        ({"adam": {"lr": "x"}}, "options that torch's Adam takes, got {'lr': 'x'}"),
        ({"adam": {"name": "sgd"}}, "optimizer 'adam' must get arguments among lr, .*, got name"),
        ({"vogn": VOGN | {"name": "ivon"}}, "optimizer 'vogn' must get arguments among lr, .*, got name"),
        ({"vogn": {"lr": -1.0}}, "lr must be a finite number >= 0|lr must be a finite number > 0"),
    ],
)
def test_a_bad_configuration_is_one_sentence_and_writes_nothing(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        train(tiny(output=str(tmp_path / "run"), **changes))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_and_not_resumed(run, tmp_path):
    folder = run[0]
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(FileExistsError, match="output must be a new folder"):
        train(tiny(output=str(folder)))
    assert (folder / "metrics.json").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="output must be a folder"):
        train(tiny(output=str(tmp_path / "file")))
    with pytest.raises(ValueError, match="resume must be off for toy2d"):
        train(tiny(output=str(tmp_path / "new")), resume=True)


def test_ctrl_c_writes_nothing_and_says_so(tmp_path, monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(ToyExperiment, "measure_epoch", interrupted)
    monkeypatch.setattr(ToyExperiment, "frame", lambda self, epoch: epoch)
    assert train(tiny(output=str(tmp_path / "run"))) is None
    assert "stopped after 0 of 3 epochs; nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    ["toy2d", "--config toy2d", "--config=toy2d", "--epochs 1 --config toy2d", "--recipe toy2d", "--recipe=toy2d"],
)
def test_the_recipe_is_found_however_it_is_named(words, tmp_path, capsys):
    assert main(["train", *words.split(), "--resume", "--output", str(tmp_path / "run")]) == 1
    assert "resume must be off for toy2d" in capsys.readouterr().err
    assert main(["train", *words.split(), "--recipe", "toy3d"]) == 1
    assert "got 'toy3d'. Did you mean 'toy2d'" in capsys.readouterr().err


def test_the_command_trains_with_options_over_the_file(tmp_path, capsys):
    words = "train toy2d --epochs 1 --frames 1 --num_samples 2 --widths [4] --vogn.num_samples 2 --data.examples 10"
    assert main([*words.split(), "--output", str(tmp_path / "run")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "total_ring" in out and "boundary.gif" in out
    card = read_card(tmp_path / "run" / "posterior")
    assert card.name == "mlp-blobs" and card.optimizer["num_samples"] == 2 and card.optimizer["lr"] == 0.01
    assert card.recipe == f"bayeslayers {words.replace('[4]', chr(39) + '[4]' + chr(39))}"
