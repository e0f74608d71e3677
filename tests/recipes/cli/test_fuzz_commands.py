"""Hostile configurations and command lines: each ends in a result or in one sentence, and none of them runs anything.

BAYESLAYERS_FUZZ sets how many of each are tried, BAYESLAYERS_FUZZ_SEED which, so that processes can share the work.
"""

from __future__ import annotations

import copy
import os
import random
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import bayeslayers as bl
import zoo
from recipes.cli import main
from recipes.cli.parser import _parser
from recipes.cli.train import CONFIGS
from recipes.training.plain_yaml import read_yaml

ROUNDS, SEED = int(os.environ.get("BAYESLAYERS_FUZZ", "200")), int(os.environ.get("BAYESLAYERS_FUZZ_SEED", "0"))
CANARY = "bayeslayers_canary"
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile")
REACHED = "the command's own work is reached"

seen: list[str] = []
watching = False


def _watch(event, arguments):
    if watching and (event in FORBIDDEN or (event == "import" and CANARY in str(arguments[0]))):
        seen.append(f"{event} {arguments}")


sys.addaudithook(_watch)  # which stays until the process ends


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Watch for programs that start and for imports of a module that leaves a file where it is imported."""
    source = f"from pathlib import Path\nPath({str(tmp_path / 'sung')!r}).touch()\ndef Bird(**_): ...\n"
    (tmp_path / f"{CANARY}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys.modules[__name__], "watching", True)
    seen.clear()
    yield
    assert not seen and not (tmp_path / "sung").exists() and CANARY not in sys.modules


def hostile(rng, tmp_path):
    """A value that some field should not take, or runs something where classes are made from data."""
    touch = f"touch {tmp_path / 'sung'}"
    return rng.choice(
        [
            lambda: {"class_path": f"{CANARY}.Bird", "init_args": {}},
            lambda: {"class_path": f"{CANARY}.Bird", "init_args": {"a": {"class_path": f"{CANARY}.Bird"}}},
            lambda: {"class_path": "subprocess.Popen", "init_args": {"args": ["sh", "-c", touch]}},
            lambda: {"class_path": "os.system", "init_args": {"command": touch}},
            lambda: {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 2}},
            lambda: {"_target_": "os.system", "_args_": [touch]},
            lambda: [{"class_path": f"{CANARY}.Bird"}],
            lambda: f"{CANARY}.Bird",
            lambda: f"__import__('{CANARY}')",
            lambda: rng.choice([-1, 0, 1, 7, 2**31, 2**63, 2**64, 10**40, -(10**40)]),
            lambda: rng.choice([-1.0, 0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")]),
            lambda: rng.choice([True, False, None, [], {}, [[]], [None], {"": {}}, ""]),
            lambda: [rng.choice([1, 2.5, "a", None, True, []]) for _ in range(rng.choice([1, 2, 3, 50]))],
            lambda: {rng.choice(["name", "lr", "a b", "é", "class_path", "0"]): rng.choice([1, "x", None, [1]])},
            lambda: rng.choice(
                ["\x1b[2J\x1b[31m", "\u202eabc", "[red]x[/red]", "é日本🙂", "a\nb", "\x9b31m", "\u200b"]
            ),
            lambda: rng.choice(
                ["../..", "~", "~nobody/x", "/dev/null", "npz:", "imagefolder:~", "npz:~/{split}", "%s{0}"]
            ),
            lambda: rng.choice(
                ["vogn", "adam", "mlp", "lenet5", "cosine", "step", "sample", "dropout", "cuda:99", "meta"]
            ),
            lambda: "x" * rng.choice([300, 5000]),
        ]
    )()


def places(tree):
    """Every key and index of a tree, with what it is in."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def mutated_tree(rng, tree, tmp_path):
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        owner, key = rng.choice(list(places(tree)))
        kind = rng.random()
        if kind < 0.1:
            del owner[key]
            if not tree:
                return tree
        elif kind < 0.25 and isinstance(owner, dict):
            owner[rng.choice(["nmae", "class_path", "init_args", "lr ", "é", "__class__", "laplace", "start"])] = (
                hostile(rng, tmp_path)
            )
        else:
            owner[key] = hostile(rng, tmp_path)
    return tree


def mutated_text(rng, text):
    """The text of a file with tags, anchors, control characters, or pieces of it out of place."""
    bomb = "l0: &l0 [1]\n" + "".join(f"l{k}: &l{k} [{f'*l{k - 1}, ' * 9}]\n" for k in range(1, 12))
    for _ in range(rng.choice([0, 0, 1, 2])):
        at = rng.randrange(len(text) + 1)
        colon = text.find(": ", at)
        colon = at if colon < 0 else colon + 2
        piece = rng.choice(
            [
                f"!!python/object/apply:{CANARY}.Bird ",
                f"!!python/module:{CANARY} ",
                f"!!python/name:{CANARY}.Bird ",
                "!!python/object/apply:os.system [echo] ",
                "!!binary ",
                "!!set ",
                "! ",
                "!local ",
                "&a ",
                "*a ",
                "<<: *a",
            ]
        )
        stray = rng.choice(
            ["\x1b", "\0", "\t", "\ufeff", "[", "{", "}", "'", '"', "---\n", "\n...\n", "%TAG ! tag:x\n", "\u2028"]
        )
        text = rng.choice(
            [
                lambda: text[:colon] + piece + text[colon:],  # noqa: B023
                lambda: text[:at] + stray + text[at:],  # noqa: B023
                lambda: text[:at],  # noqa: B023
                lambda: text[:at] + text[at:][: rng.randrange(40)] * 3 + text[at:],  # noqa: B023
                lambda: text + "x: " + "[" * rng.choice([30, 3000]) + "\n",  # noqa: B023
                lambda: bomb + text,  # noqa: B023
            ]
        )()
    return text


def ends_well(capsys, words, outcomes):
    """Run a command; check that it ends in a result, a usage error, or one sentence."""
    try:
        status = main(words)
    except SystemExit as stopped:
        status = f"exit {stopped.code}"
    out, error = capsys.readouterr()
    assert status in (0, 1, 130, "exit 0", "exit 2"), words
    assert "Traceback" not in error and "unexpected " not in error.partition(":")[2][:12], (words, error)
    if status == 1:
        assert error.startswith("bayeslayers: ") and error.count("\n") == 1 and len(error) < 700, (words, error)
        assert error[:-1].isprintable(), (words, error)
        outcomes["reached" if REACHED in error else "refused"] += 1
    else:
        assert "\x1b" not in out + error and "\u202e" not in out + error, (words, out, error)
        outcomes[str(status)] += 1


def stop(*_, **__):
    raise ValueError(REACHED)


def test_hostile_configurations_run_nothing(watched, capsys, tmp_path, monkeypatch):
    create = zoo.create

    def create_on_paper(*words, **options):
        with torch.device("meta"):
            create(*words, **options)
        stop()

    monkeypatch.setattr(zoo, "create", create_on_paper)
    monkeypatch.setattr("recipes.tasks.toy2d.ToyExperiment.prepare", stop)
    trees = [read_yaml(path.read_text(), path.name) for path in sorted(CONFIGS.rglob("*.yaml"))]
    rng, outcomes = random.Random(2 * SEED), Counter()
    for number in range(ROUNDS):
        tree = mutated_tree(rng, copy.deepcopy(rng.choice(trees)), tmp_path)
        text = mutated_text(rng, yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5, sort_keys=False))
        file = tmp_path / "it.yaml"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        words = ["train", str(file), "--output", str(tmp_path / f"run{number}")]
        for _ in range(rng.choice([0, 0, 1, 2])):
            option = rng.choice(
                ["model", "optimizer", "model.widths", "optimizer.lr", "start", "schedule", "data", "vogn.lr"]
            )
            value = yaml.safe_dump(hostile(rng, tmp_path), default_flow_style=True).removesuffix("...\n").strip()
            words.append(f"--{option}={value}")
        ends_well(capsys, words, outcomes)
    print(dict(outcomes))
    assert outcomes["reached"] > ROUNDS / 30 and outcomes["refused"] > ROUNDS / 3 and outcomes["0"] == 0


@pytest.fixture
def folders(tmp_path):
    """What command lines may name: images, a posterior, a run, and files that are none of these."""
    rng = np.random.default_rng(0)
    (tmp_path / "images/deep").mkdir(parents=True)
    Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).save(tmp_path / "images/deep/0.png")
    (tmp_path / "images/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    (tmp_path / "postscript.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    torch.manual_seed(0)
    names = [f"\x1b[3{k}m[red]{k}\u202e" for k in range(10)]
    bl.save_posterior(zoo.create("mlp", widths=[2]), tmp_path / "posterior", class_names=names, dataset="\x1b[5mnone")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.csv").write_text("epoch,seconds,train_accuracy,test_accuracy,test_nll\n1,1,0.5,0.5,1\n")
    (tmp_path / "run/metrics.json").write_text('{"accuracy": 0.5, "ood_auroc_\\u001b[31m[red]": 0.5}')
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/log.csv").write_bytes(bytes(rng.integers(0, 256, 200, dtype=np.uint8)))
    return [
        str(tmp_path / name)
        for name in ("images", "images/deep/0.png", "postscript.png", "posterior", "run", "damaged")
    ]


COMMANDS = "demo list info predict train publish download search verify compare evaluate diagnose benchmark".split()
WORDS = """
--json --help --version --num-samples --seed --output --method --device --limit --batch-size --ood --data --data-root
--report --record --all --markdown --rounds --optimizers --models --invert --private --revision --config --resume
--organisation --tag --license
--print_config --recipe --optimizer.lr --model --nonsense -x -- lenet5-mnist mlp-blobs mnist/lenet5_vogn toy2d step
load mean dropout linearised 0 -1 1 2 1e3 99999999999999999999 cpu cuda:7 owner/repo owner/repo@main
hf://owner/repo@x https://huggingface.co/owner/repo mnist npz: npz:a.npz imagefolder:. ~ ~/x . / /dev/null
""".split()


def test_hostile_command_lines_run_nothing(watched, capsys, tmp_path, folders, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    reports = "demo.demo verify.verify verify.record verify_data.load_split benchmark.benchmark_step"
    reports += " benchmark.benchmark_load benchmark_predict.benchmark_predict benchmark_memory.benchmark_memory"
    work = ["bayeslayers.predict", "zoo.loading.download", "zoo.loading.publish_all", "recipes.tasks.task.Task.train"]
    work += ["bayeslayers.diagnosis.tensors.tensors_of"]
    work += ["recipes.tasks.images.load_split", *(f"recipes.reports.{name}" for name in reports.split())]
    for name in work:
        monkeypatch.setattr(name, stop)
    rng, outcomes = random.Random(2 * SEED + 1), Counter()
    (added,) = (action for action in _parser(["train"])._actions if action.choices)
    options = {name: [a for a in own._actions if a.option_strings] for name, own in added.choices.items()}
    likely = {
        "info": [*folders[3:4], "lenet5-mnist"],
        "predict": ["lenet5-mnist", *folders[:3]],
        "compare": folders[4:5],
        "evaluate": ["lenet5-mnist"],
        "diagnose": ["lenet5-mnist"],
        "train": ["mnist/lenet5_vogn", "toy2d"],
        "verify": ["lenet5-mnist"],
    }
    for _ in range(ROUNDS):
        command = rng.choice(COMMANDS)
        words = [command, *(likely.get(command, []) if rng.random() < 0.5 else [])]
        for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
            odd = str(hostile(rng, tmp_path)).replace("\0", "")
            word = rng.choice([rng.choice(WORDS), rng.choice(WORDS), rng.choice(folders), odd])
            if rng.random() < 0.5:  # an option of this command
                option = rng.choice(options[command])
                word = option.option_strings[-1] + (f"={word}" if option.nargs is None else "")
            words.append(word)
        if rng.random() < 0.1:
            rng.shuffle(words)
        ends_well(capsys, words, outcomes)
    print(dict(outcomes))
    assert outcomes["reached"] > ROUNDS / 50 and outcomes["refused"] > ROUNDS / 10 and outcomes["0"] > 0
