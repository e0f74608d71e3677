from __future__ import annotations

import dataclasses
import json
import os
import re
import typing

import pytest
import yaml

from recipes.cli import main
from recipes.cli.train import CONFIGS
from recipes.tasks import images, toy2d
from recipes.tasks.table import DEFAULT, TASKS
from recipes.tasks.task import Task
from recipes.training.options import options, type_name

NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))


@pytest.fixture
def parsed(monkeypatch):
    """A function of words to what `train` is called with, which it is not."""
    found = []
    monkeypatch.setattr(Task, "train", lambda task, *given: found.append((task.config, *given)) or {})

    def parse(*words):
        found.clear()
        assert main(["train", *words]) == 0
        return found[0]

    return parse


def failure(capsys, *words):
    """The one line on stderr of a training that is refused."""
    assert main(["train", *words]) == 1
    out, error = capsys.readouterr()
    assert error.startswith("bayeslayers: ") and error.count("\n") == 1 and not out
    return error


def typed(value):
    if isinstance(value, dict):
        return {key: typed(part) for key, part in value.items()}
    return [typed(part) for part in value] if isinstance(value, list) else (type(value), value)


def expected(kind, values):
    """What a file should make: its own values over the defaults, whole numbers as floats where a float is wanted."""
    hints, made = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        inner = [arm for arm in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(arm)]
        given = field.name in values
        if inner and (given or hint is inner[0]):
            made[field.name] = expected(inner[0], values.get(field.name, {}))
        elif given:
            made[field.name] = float(values[field.name]) if hint is float else values[field.name]
        else:
            factory = field.default_factory
            made[field.name] = field.default if factory is dataclasses.MISSING else factory()
    return made


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_file_makes_the_configuration_that_it_says(parsed, name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    values = yaml.safe_load(re.sub(r"(\d\.\d+e)(\d)", r"\1+\2", text))  # 1.0e4 is text to PyYAML
    config, resume, command = parsed(name)
    kind = TASKS[values.get("recipe", DEFAULT)]().Config
    assert type(config) is kind and not resume and command == f"bayeslayers train {name}"
    assert typed(dataclasses.asdict(config)) == typed(expected(kind, values))


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("--optimizer.lr 0.1", "optimizer.lr", 0.1),
        ("--optimizer.lr=1e-1", "optimizer.lr", 0.1),
        ("--optimizer.lr=1", "optimizer.lr", 1),
        ("--optimizer.prior-precision 3", "optimizer.prior_precision", 3),
        ("--optimizer.name=adam", "optimizer.name", "adam"),
        ("--optimizer {name:~adam,~lr:~1e-3}", "optimizer", {"name": "adam", "lr": 0.001}),
        ("--model={name:~mlp,~widths:~[8]}", "model", {"name": "mlp", "widths": [8]}),
        ("--model.widths [8,~8]", "model.widths", [8, 8]),
        ("--epochs 3", "epochs", 3),
        ("--schedule.gamma 1", "schedule.gamma", 1.0),
        ("--schedule.milestones [1,2]", "schedule.milestones", [1, 2]),
        ("--schedule {name:~step} --schedule.gamma .5", "schedule.name", "step"),
        ("--augmentation.flip true --augmentation {padding:~4}", "augmentation.flip", True),
        ("--augmentation.border reflect", "augmentation.border", "reflect"),
        ("--evaluation {num_samples:~3}", "evaluation.ood", ["fashion-mnist"]),
        ("--evaluation.ood []", "evaluation.ood", []),
        ("--evaluation.ood=['svhn','npz:a_{split}.npz']", "evaluation.ood", ["svhn", "npz:a_{split}.npz"]),
        ("--evaluation.num-samples 7", "evaluation.num_samples", 7),
        ("--evaluation.method dropout --evaluation.method null", "evaluation.method", None),
        ("--laplace {last_layer:~true} --laplace.temperature 0.5", "laplace.last_layer", True),
        ("--laplace.temperature 0.5", "laplace.temperature", 0.5),
        ("--laplace.temperature 0.5 --laplace null", "laplace", None),
        ("--compile false", "compile", False),
        ("--compile=yes", "compile", True),
        ("--checkpoint-minutes 1", "checkpoint_minutes", 1.0),
        ("--limit null", "limit", None),
        ("--seed -5", "seed", -5),
        ("--name 5", "name", "5"),
        ("--notes {a:~b}", "notes", "{a: b}"),
        ("--notes null", "notes", "null"),
        ("--notes=", "notes", ""),
        ("--data npz:a_{split}.npz", "data", "npz:a_{split}.npz"),
        ("--data-root /a/b", "data_root", "/a/b"),
    ],
)
def test_options_override_the_file_wherever_they_stand(parsed, words, path, value):
    words = [word.replace("~", " ") for word in words.split()]
    for order in ((*words, "mnist/lenet5_vogn"), ("mnist/lenet5_vogn", *words), (*words, "--config=mnist/lenet5_vogn")):
        found = dataclasses.asdict(parsed(*order)[0])
        for part in path.split("."):
            found = found[part]
        assert typed(found) == typed(value)


def test_all_may_come_from_options(parsed):
    config, *_ = parsed("--name", "x", "--model.name", "mlp", "--data", "mnist", "--optimizer={name: adam}")
    assert config == images.Config(name="x", model={"name": "mlp"}, data="mnist", optimizer={"name": "adam"})
    assert parsed("--recipe=toy2d", "--widths", "[3]")[0] == toy2d.Config(widths=[3])


def test_home_folders_are_found_in_every_path(parsed, monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    words = "--data npz:~/x_{split}.npz --data_root ~/data --output ~/runs/1 --start ~/a --baseline=~/b"
    config, _, command = parsed("mnist/lenet5_vogn", *words.split(), "--evaluation.ood", "['imagefolder:~/c', '~d']")
    assert (config.data, config.data_root) == ("npz:/users/me/x_{split}.npz", "/users/me/data")
    assert (config.output, config.start, config.baseline) == ("/users/me/runs/1", "/users/me/a", "/users/me/b")
    assert config.evaluation.ood == ["imagefolder:/users/me/c", "~d"] and os.path.expanduser("~d") == "~d"
    assert "~" not in command.replace("~d", "") and "users" not in command
    assert parsed("toy2d", "--output", "~/toy")[0].output == "/users/me/toy"


def test_print_config_prints_a_file_that_makes_the_same_again(parsed, capsys, tmp_path):
    for name in ("cifar10/resnet18_vogn", "mnist/lenet5_laplace", "toy2d"):
        capsys.readouterr()
        assert main(["train", name, "--print_config", "--epochs", "2"]) == 0
        (tmp_path / "it.yaml").write_text(capsys.readouterr().out)
        assert parsed(str(tmp_path / "it.yaml"))[0] == parsed(name, "--epochs=2")[0]


def test_help_lists_every_option_with_its_type_and_text(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    for recipe in TASKS.values():
        for option in options(recipe().Config):
            assert f" --{'.'.join(option.path)} {option.path[-1].upper()} " in shown and len(option.text) > 5
            assert f"{option.text} ({type_name(option.kind)}" in shown
            if isinstance(option.default, int | float | str):
                assert f"{option.text} ({type_name(option.kind)}, default: {json.dumps(option.default)})" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--epochs many", "epochs must be an integer, got 'many'"),
        ("--epochs 2.0", "epochs must be an integer, got 2.0"),
        ("--epochs true", "epochs must be an integer, got True"),
        ("--compile 1", "compile must be true or false, got 1"),
        ("--schedule.gamma [1]", "schedule.gamma must be a number, got [1]"),
        ("--schedule.milestones 3", "schedule.milestones must be a list, got 3"),
        ("--schedule.milestones [1,a]", "schedule.milestones.1 must be an integer, got 'a'"),
        ("--augmentation null", "augmentation must be a mapping"),
        ("--augmentation.border edge", "augmentation.border must be 'zeros' or 'reflect', got 'edge'"),
        ("--model 3", "model must be a mapping"),
        ("--optimizer {lr:~1", "--optimizer must be YAML"),
        ("--optimizer.lr=!!python/name:os.system", "--optimizer.lr must hold plain data, got the tag"),
        ("--notes \x1b[31m", r"--notes must be text, got the control character or broken Unicode '\x1b'"),
        ("--schedule {nam:~step}", "unknown option 'nam' of schedule. Did you mean 'name' or 'gamma'?"),
        ("--laplace.temprature 1", "unknown option 'temprature' of laplace. Did you mean 'temperature'?"),
        (
            "--evalution.num_samples 1",
            "unrecognized arguments: --evalution.num_samples 1. Did you mean '--evaluation.num",
        ),
        ("--epochs.a 1", "unknown option 'epochs.a': epochs is int, without parts"),
        ("--vogn.lr 1", "unknown option 'vogn'"),
        ("--recipe toy2d", "unknown option 'model'"),
        ("--recipe os", "toy2d, got 'os'"),
        ("--config mnist/mlp_vogn", "CONFIG must be given once"),
        ("mnist/mlp_vogn", "unrecognized arguments: mnist/mlp_vogn"),
        (f"--model.{'a.' * 30}b 1", "at most 20 levels deep"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(capsys, words, message):
    assert message in failure(capsys, "mnist/lenet5_vogn", *(word.replace("~", " ") for word in words.split()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epochs: 3\nnmae: x", "unknown option 'nmae'. Did you mean 'name'"),
        ("name: x\ndata: mnist\nmodel: {}", "optimizer must be given"),
        ("", "must hold a mapping of options to values, got NoneType"),
        ("- 1", "must hold a mapping of options to values, got list"),
        ("recipe: [1]", "toy2d, got [1]"),
        ("recipe: toy2d\ndata: {centres: 1.5}", "data.centres must be an integer, got 1.5"),
        ("name: 5\ndata: mnist\nmodel: {}\noptimizer: {}", "name must be text, got 5"),
        (b"name: \xff", "must be text in UTF-8"),
        ("name: " + "x" * 200_000, "must have at most 100,000 characters"),
        (b"\xff" * 10**6, "must be text in UTF-8"),
    ],
    ids=range(10),
)
def test_bad_files_are_refused_in_a_sentence(capsys, tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in failure(capsys, str(tmp_path / "a.yaml"))
