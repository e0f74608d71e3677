"""A checkpoint whose hash is right and whose content is not: one sentence, through `start` and `--resume` alike."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.storage.training_state import _digest, load_checkpoint, save_checkpoint, save_tensors
from recipes.tasks.classification import train
from recipes.tasks.images import Config
from recipes.training.config import Evaluation
from recipes.training.start import go_on_from

NAME = "checkpoint.safetensors"
WEIGHT = "hidden1.weight"


def config(root, folder, **fields):
    return Config(
        **{
            "name": "tiny",
            "model": {"name": "mlp", "widths": [4], "mean": [0.1]},
            "data": "mnist",
            "optimizer": {"name": "vogn", "lr": 0.01},
            "epochs": 2,
            "limit": 64,
            "evaluation": Evaluation(num_samples=2, epoch_samples=2),
            "output": str(folder),
            "data_root": str(root),
        }
        | fields
    )


@pytest.fixture(scope="module")
def state(data_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("restore") / "run"
    train(config(data_root, folder))
    return load_checkpoint(folder / NAME)


def model_with(name, change):
    return lambda state: state["model"].update({name: change(state["model"].get(name))})


OF_MODELS = [
    (lambda state: state.pop("model"), None),
    (lambda state: state.update(model=3), "must hold tensors by name, got int"),
    (lambda state: state.update(model={1: torch.ones(2)}), "must hold tensors by name, got dict"),
    (lambda state: state["model"].pop(WEIGHT), rf"must hold tensor '{WEIGHT}', got none of that name \(1 missing\)"),
    (model_with("extra", lambda _: torch.ones(2)), r"got 'extra' \(1 unknown\)"),
    (model_with(WEIGHT, lambda w: w.T), rf"'{WEIGHT}' must be torch.float32 of shape"),
    (model_with(WEIGHT, lambda w: w.long()), rf"'{WEIGHT}' must be torch.float32 .* got I64"),
    (model_with(WEIGHT, lambda w: w * math.nan), rf"'{WEIGHT}' must be finite"),
    (model_with(WEIGHT, lambda w: w.double() * 1e300), rf"'{WEIGHT}' must be finite"),
    (model_with(WEIGHT, lambda w: 3), rf"'{WEIGHT}' must be of real numbers, got int"),
    (model_with(f"{WEIGHT}_precision", lambda p: -p), rf"precision '{WEIGHT}_precision' must be > 0, got -"),
    (model_with(f"{WEIGHT}_prior_precision", lambda p: 0 * p), rf"'{WEIGHT}_prior_precision' must be > 0, got 0"),
    (model_with("normalise.std", lambda s: -s), r"standard deviation 'normalise.std' must be > 0, got -1"),
    (model_with("normalise.std", lambda s: 0 * s), r"standard deviation 'normalise.std' must be > 0, got 0"),
    (model_with("normalise.mean", lambda m: m / 0), "'normalise.mean' must be finite"),
]
KEYS = ("optimizer", "schedulers", "rng", "epoch", "rows")
OF_RUNS = [
    *[(lambda state, key=key: state.pop(key), key) for key in (*KEYS, "sums", "step")],
    *[(lambda state, key=key: state.update({key: "x"}), None) for key in KEYS],
    (lambda state: state.update(identity=[1]), None),
    (lambda state: state.pop("identity"), "identity"),
    (lambda state: state.update(step=-1), "step must be an integer >= 0, got -1"),
    (lambda state: state.update(epoch=7), "rows must be one for each epoch"),
    (lambda state: state.update(rng=torch.ones(3)), None),
    (lambda state: state.update(bins=torch.ones(3)), "bins must be finite, of shape"),
    (lambda state: state["sums"].update(loss="x"), "sums must be numbers named loss, accuracy, seconds"),
    (lambda state: state["rows"][0].update(seconds="x"), "rows must hold numbers by name"),
    (lambda state: state["optimizer"].pop("param_groups"), "param_groups"),
    (lambda state: state["optimizer"]["param_groups"].pop(), None),
    (lambda state: momentum(state).update({"grad_average": torch.ones(3, 5)}), "must have the shape"),
    (lambda state: momentum(state).update({"grad_average": torch.tensor([math.nan])}), "must be finite, got NaN"),
]  # fmt: skip


def momentum(state):
    return next(iter(state["optimizer"]["state"].values()))


@pytest.mark.parametrize(("change", "message"), OF_MODELS)
def test_start_takes_no_bad_state(state, tmp_path, change, message):
    changed = copy.deepcopy(state)
    change(changed)
    save_checkpoint(tmp_path / NAME, changed)
    model = zoo.create("mlp", widths=[4], mean=[0.1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        go_on_from(str(tmp_path), model)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("start must be")
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(("change", "message"), OF_MODELS + OF_RUNS)
def test_no_bad_state_is_resumed(state, data_root, tmp_path, change, message):
    changed = copy.deepcopy(state)
    change(changed)
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / NAME, changed)
    with pytest.raises(bl.PosteriorError, match=message) as caught:
        train(config(data_root, tmp_path / "run"), resume=True)
    assert "\n" not in str(caught.value) and str(tmp_path / "run" / NAME) in str(caught.value)


def test_the_state_as_it_was_is_resumed(state, data_root, tmp_path):
    (tmp_path / "run").mkdir()
    save_checkpoint(tmp_path / "run" / NAME, state)
    assert train(config(data_root, tmp_path / "run"), resume=True)


@pytest.mark.parametrize(
    "tree",
    [
        '{"set": []}', '{"tensor": "9"}', '{"tensor": []}', '{"dict": 3}', '{"dict": [3]}',
        '{"dict": [[{"list": []}, 1]]}',
        '{"list": 3}', "{}", '{"list": [], "tuple": []}', "[1]", "3", "null", "x", '{"list": [' * 5000 + "]}" * 5000,
        '{"dict": {"a": 1}}', '{"tensor": {"a": 1}}', '{"list": [{"tensor": null}]}',
    ],
)  # fmt: skip
def test_what_is_no_state_within_is_one_sentence(tmp_path, tree):
    tensors = {"0": torch.ones(2)}
    (tmp_path / "c").write_bytes(save_tensors(tensors, metadata={"state": tree, "sha256": _digest(tree, tensors)}))
    with pytest.raises(
        bl.PosteriorError, match="c must be a training checkpoint, got a damaged or other file: "
    ) as error:
        load_checkpoint(tmp_path / "c")
    assert str(error.value).isprintable() and len(str(error.value)) < 500
