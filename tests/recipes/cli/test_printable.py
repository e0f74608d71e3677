"""Text from files reaches no terminal and no page as anything but text."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import bayeslayers as bl
import zoo
from bayeslayers.display import one_line, printable, printable_lines
from bayeslayers.storage.card import PosteriorError
from bayeslayers.storage.posterior import read_card
from recipes.cli import main
from recipes.reports.compare import compare
from recipes.reports.html import report_html
from recipes.reports.measure import EvaluationRequest, EvaluationResult
from zoo.hub import Found

EVIL = "\x1b[31m\x1b]8;;http://evil\x07\x9b2J\u202eabc\u2066\x07[red]x[/red][link=http://evil]y[/link]:bomb:\r\x7f<b>&"
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def no_raw(text):
    """Check that text holds no control character but line ends, no change of direction, and shows markup as it is."""
    assert not RAW.search(text), ascii(RAW.search(text))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """An image, a posterior and a run whose every name is hostile."""
    folder = tmp_path_factory.mktemp("evil")
    image = folder / "a[red]\u202e\x1b[31m.png"
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(image)
    torch.manual_seed(0)
    names = [f"{k}{EVIL}" for k in range(10)]
    bl.save_posterior(
        zoo.create("mlp", widths=[2]),
        folder / "posterior",
        name=f"n{EVIL}",
        class_names=names,
        dataset=f"d{EVIL} (1 train, 1 test)",
        recipe=f"r{EVIL}",
        notes=f"first{EVIL}\nsecond{EVIL} [hidden](http://evil)",
        optimizer={"name": EVIL, EVIL: 1},
        metrics={f"m{EVIL}": 0.5, "accuracy": 0.5, f"ood_auroc_{EVIL}": 0.5, "num_samples": 2, "seed": 0},
        baseline={"optimizer": EVIL, "accuracy": 0.4},
        method="mean",
    )
    run = folder / f"run{EVIL.replace('/', '_')}"
    run.mkdir()
    (run / "log.csv").write_text(f"epoch,seconds,train_accuracy,test_accuracy,{EVIL!r}\n1,1,0.5,0.5,1\n")
    (run / "metrics.json").write_text(json.dumps({"accuracy": 0.5, f"ood_auroc_{EVIL}": 0.7}))
    plan = {"optimizer": {"name": EVIL}, "data": f"npz:{EVIL}", "epochs": 1}
    (run / "config.json").write_text(json.dumps(plan))
    return str(image), str(folder / "posterior"), str(run)


def run(capsys, monkeypatch, *words, columns="200"):
    monkeypatch.setenv("COLUMNS", columns)
    status = main(words)
    out, error = capsys.readouterr()
    no_raw(out)
    no_raw(error)
    assert "\N{BOMB}" not in out and "Traceback" not in error
    return status, out, error


@pytest.mark.parametrize("columns", ["200", "60"])
def test_predict_and_info_show_names_as_text(capsys, monkeypatch, places, columns):
    image, posterior, _ = places
    status, out, _ = run(capsys, monkeypatch, "predict", posterior, image, "--num-samples", "2", columns=columns)
    assert status == 0 and "[red]" in out and "[/red]" in out.replace("\n", "") and ":bomb:" in out.replace("\n", "")
    status, out, _ = run(capsys, monkeypatch, "info", posterior, columns=columns)
    assert status == 0 and "first" in out and "http://evil" in out  # where a link leads is shown


def test_json_escapes_names(capsys, monkeypatch, places):
    image, posterior, folder = places
    _, out, _ = run(capsys, monkeypatch, "predict", posterior, image, "--num-samples", "2", "--json")
    assert json.loads(out)[0]["label"][1:] == EVIL and json.loads(out)[0]["image"] == image
    _, out, _ = run(capsys, monkeypatch, "info", posterior, "--json")
    assert json.loads(out)["class_names"] == read_card(posterior).class_names
    _, out, _ = run(capsys, monkeypatch, "compare", folder, "--json")
    assert json.loads(out)[0][f"ood_auroc_{EVIL}"] == 0.7


@pytest.mark.parametrize("words", [[], ["--markdown"]])
def test_compare_shows_names_as_text(capsys, monkeypatch, places, words):
    status, out, _ = run(capsys, monkeypatch, "compare", places[2], *words, columns="1000")
    assert status == 0 and "[red]x[/red]" in out and ":bomb:" in out


def test_a_terminal_gets_no_link_of_a_card(places):
    from rich.console import Console

    console = Console(force_terminal=True, width=500, color_system="truecolor", legacy_windows=False)
    with console.capture() as text:
        console.print(compare([places[2]]))
    assert "\x1b]8" not in text.get() and not RAW.search(re.sub("\x1b\\[[0-9;]*m", "", text.get()))
    evaluation = dataclasses.replace(a_result().evaluation, metrics={f"{EVIL}/auroc_entropy": 0.5})
    no_raw(str(evaluation))
    assert "[red]x[/red]" in str(evaluation)


def a_result():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    evaluation = bl.evaluate(bl.BayesLinear(4, 3), (x, y), ood={EVIL: (x,)}, num_samples=2)
    request = EvaluationRequest(posterior=EVIL, data=EVIL, ood=[EVIL])
    return EvaluationResult(request, evaluation, sections=[], versions={EVIL: EVIL}, command=EVIL)


def test_a_report_shows_names_as_text():
    page = report_html(a_result())
    no_raw(re.sub(r'src="data:[^"]*"', "", page))
    assert "<b>&" not in page and "&lt;b&gt;&amp;" in page


def test_verify_evaluate_and_search_show_names_as_text(capsys, monkeypatch, places):
    status, _, error = run(capsys, monkeypatch, "verify", places[1])
    assert status == 1 and error.startswith("bayeslayers: ")
    status, _, error = run(capsys, monkeypatch, "evaluate", places[1])
    assert status == 1 and error.startswith("bayeslayers: ")
    monkeypatch.setattr("zoo.hub.search", lambda *_, **__: [Found(f"o/{EVIL}", 1, 2, EVIL, (EVIL,))])
    status, out, _ = run(capsys, monkeypatch, "search", "x")
    assert status == 0 and out.count("\n") == 1 and "[red]x[/red]" in out
    monkeypatch.setattr("recipes.tasks.evaluate.evaluate", lambda *_, **__: a_result())
    status, out, _ = run(capsys, monkeypatch, "evaluate", places[1])
    assert status == 0 and "[red]x[/red]" in out


@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError, MemoryError, RuntimeError])
def test_errors_are_one_printable_line(capsys, monkeypatch, kind):
    monkeypatch.setattr(zoo, "list_models", lambda: (_ for _ in ()).throw(kind(f"{EVIL}\n{'x' * 5000}{EVIL}")))
    status, out, error = run(capsys, monkeypatch, "list", "--json")
    assert status == 1 and not out and error.count("\n") == 1 and len(error) < 800
    assert kind not in (KeyError, MemoryError) or f"unexpected {kind.__name__}" in error


def test_one_place_makes_text_printable():
    assert printable("a\tb\u00a0c\x00\x1b\u200b\ud800é日🙂") == "a b c????é日🙂"
    assert printable_lines("a\x1b\r\nb\u2028c") == "a?\nb\nc"
    assert one_line(f"a \n b{'c' * 2000}").startswith("a bc") and len(one_line("d" * 2000)) < 600
    assert str(PosteriorError(f"{EVIL}\n")) == one_line(f"{EVIL}\n") and one_line(EVIL).isprintable()
