from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.corruptions import KINDS
from recipes.cli import main
from recipes.data.split import load_split
from recipes.reports.html import report_html, write_report
from recipes.reports.measure import EvaluationRequest, EvaluationResult, check_request
from recipes.reports.metrics import meaning
from recipes.tasks.classification import MISTAKES, Mistake, find_mistakes, mistakes_section
from recipes.tasks.evaluate import evaluate

HOSTILE = "<script src=http://evil.example/x.js></script>\" onerror='alert(1)' & {braces} $x_{1"


class Reader(HTMLParser):
    """The elements of a document, and what it shows."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def pictures(self):
        """The images, decoded."""
        for tag, attributes in self.elements:
            if tag == "img":
                start, _, content = attributes["src"].partition(",")
                assert start == "data:image/png;base64"
                yield Image.open(io.BytesIO(base64.b64decode(content, validate=True)))


def a_result(name="digits", mistakes=(), **metrics):
    x, y = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    evaluation = bl.evaluate(bl.BayesLinear(4, 3), (x, y), ood={name: 10 * x}, num_samples=4, generator=generator)
    evaluation = dataclasses.replace(evaluation, metrics=evaluation.metrics | metrics)
    request = EvaluationRequest(name, data=name, ood=[name])
    return EvaluationResult(request, evaluation, [mistakes_section(mistakes)], {"torch": "2"}, request.command())


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    """A folder with an untrained posterior for MNIST."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("posteriors") / "tiny"
    bl.save_posterior(zoo.create("mlp", widths=[8]), folder, dataset="mnist (300 train, 100 test)")
    return folder


def test_a_report_loads_nothing_and_shows_every_metric():
    grey, colour = torch.zeros(1, 5, 4, dtype=torch.uint8), torch.full((3, 300, 200), 7, dtype=torch.uint8)
    result = a_result(mistakes=[Mistake(grey, "cat", "dog", 0.987), Mistake(colour, "ant", "bee", 0.5)], odd=math.nan)
    html = report_html(result)
    page = Reader(html)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link", re.sub(r"base64,[^\"]*", "", html))
    assert {attributes["src"][:11] for tag, attributes in page.elements if tag == "img"} == {"data:image/"}
    assert not [attributes for _, attributes in page.elements if "href" in attributes]
    sizes = [picture.size for picture in page.pictures()]
    assert len(sizes) == 4 + 2 and min(sizes[0]) > 500 and sizes[4:] == [(4, 5), (75, 112)]
    for key, value in result.evaluation.metrics.items():
        shown = "undefined" if math.isnan(value) else f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.6f}"
        assert f"{key}{shown}{meaning(key)}" in page.text
    assert "predicted dog (99%)is cat" in page.text and "predicted bee (50%)is ant" in page.text
    assert "bayeslayers evaluate digits --data digits --ood digits" in page.text and "torch 2" in page.text
    viewport = [attributes for tag, attributes in page.elements if attributes.get("name") == "viewport"]
    assert len(viewport) == 1 and "color-scheme: light dark" in html


def test_a_report_without_mistakes_says_so_and_without_ood_draws_none():
    result = a_result()
    known = dataclasses.replace(result.evaluation, ood={})
    page = Reader(report_html(dataclasses.replace(result, evaluation=known)))
    assert "None: every example is predicted rightly." in page.text and len(list(page.pictures())) == 2


def test_a_report_of_a_training_shows_its_curves_and_its_command():
    rows = [{"epoch": number, "train_loss": 1 / number, "test_nll": 2 / number} for number in (1, 2, 3)]
    result = dataclasses.replace(a_result(), log=rows, command="bayeslayers train tiny")
    for method, draws, weights in [
        ("sample", 1, "1 draw of the weights"),
        ("mean", 8, "the means of the weights"),
        ("moments", 8, "the moments of the activations, in one pass"),
        ("local", 8, "8 draws of the activations"),
        ("linearised", 8, "8 draws of the outputs, linear in the weights"),
        ("dropout", 8, "the means of the weights, with 8 draws of dropout"),
    ]:
        request = dataclasses.replace(result.request, num_samples=draws, method=method)
        text = Reader(report_html(dataclasses.replace(result, epoch_request=request))).text
        assert f"The others were measured after each epoch, by {weights}." in text
    page = Reader(report_html(result))
    assert [a["alt"] for tag, a in page.elements if tag == "img"][-1] == "Training curves"
    assert "bayeslayers train tiny" in page.text and "bayeslayers evaluate" not in page.text


def test_names_of_others_are_text_and_never_markup():
    image = torch.zeros(1, 5, 4, dtype=torch.uint8)
    plain, hostile = (
        Reader(report_html(a_result(name, [Mistake(image, name, name, 0.9)]))) for name in ("name", HOSTILE)
    )
    elements, expected = (
        [(tag, set(attributes)) for tag, attributes in page.elements if tag != "wbr"] for page in (hostile, plain)
    )
    assert elements == expected
    assert hostile.text.count(HOSTILE) >= 4


def test_every_metric_of_an_evaluation_has_a_meaning():
    for key in (*a_result("entropy").evaluation.metrics, *(f"corrupted_{key}" for key in ("accuracy", "nll", "ece"))):
        assert re.search(r"(Higher|Lower) is better\.$", meaning(key)) and not re.search("[{}]", meaning(key)), key
    assert "“far”" in meaning("far/auroc_epistemic") and "mutual information" in meaning("far/auroc_epistemic")
    assert meaning("colour") == ""


def test_the_command_names_what_was_asked_and_no_place():
    assert EvaluationRequest("lenet5-mnist").command() == "bayeslayers evaluate lenet5-mnist"
    asked = EvaluationRequest("my net", "mnist", ["svhn", "a b"], 8, 1, "mean", 5, 50)
    assert asked.command() == (
        "bayeslayers evaluate 'my net' --data mnist --ood svhn --ood 'a b' --num-samples 8 --seed 1 --method mean "
        "--limit 5 --batch-size 50"
    )
    placed = EvaluationRequest("/Users/alice/runs/net", "npz:/Users/alice/x.npz", ["imagefolder:/Users/alice/pets/"])
    assert placed.command() == "bayeslayers evaluate net --data npz:x.npz --ood imagefolder:pets"


def test_a_result_has_the_metrics_of_the_library(mlp, data_root):
    result = evaluate(
        EvaluationRequest(str(mlp), ood=["fashion-mnist"], num_samples=3, seed=5, batch_size=40), data_root
    )
    known, ood = (load_split(name, data_root, train=False) for name in ("mnist", "fashion-mnist"))
    batches = [(known.inputs(slice(k, k + 40)), known.labels[k : k + 40]) for k in (0, 40, 80)]
    expected = bl.evaluate(
        zoo.load(mlp),
        batches,
        ood={"fashion-mnist": [ood.inputs(slice(k, k + 40)) for k in (0, 40, 80)]},
        num_samples=3,
        generator=torch.Generator().manual_seed(5),
    )
    assert result.evaluation.metrics == pytest.approx(expected.metrics, nan_ok=True)
    assert result.request.data == "mnist" and result.evaluation.num_examples == 100
    mistakes = find_mistakes(zoo.load(mlp), known, result.evaluation, result.request)
    assert [picture.image is not None for picture in result.sections[0].pictures] == [True] * len(mistakes)
    confidences = [mistake.confidence for mistake in mistakes]
    assert 0 < len(confidences) <= MISTAKES and confidences == sorted(confidences, reverse=True)
    originals = {image.numpy().tobytes() for image in known.images}
    for mistake in mistakes:
        assert mistake.label != mistake.predicted and mistake.image.numpy().tobytes() in originals
    plain = json.loads(result.to_json())
    assert plain["metrics"]["accuracy"] == pytest.approx(expected.metrics["accuracy"])
    assert plain["seed"] == 5 and plain["ood"] == ["fashion-mnist"] and "torch" in plain["versions"]


def test_labels_go_by_name_where_the_card_has_another_order(mlp, tmp_path, data_root):
    model, known = zoo.load(mlp), load_split("mnist", data_root, train=False)
    digits = [str(digit) for digit in range(10)]
    bl.save_posterior(model, tmp_path / "named", class_names=digits)
    order = np.random.default_rng(0).permutation(10)
    renumbered = np.argsort(order)[known.labels.numpy()]
    arrays = {"images": known.images[:, 0].numpy(), "labels": renumbered, "classes": np.array(digits)[order]}
    np.savez(tmp_path / "shuffled.npz", **arrays)
    ask = EvaluationRequest(str(tmp_path / "named"), f"npz:{tmp_path}/shuffled.npz", method="mean")
    by_name, by_number = (evaluate(request, data_root) for request in (ask, dataclasses.replace(ask, data="mnist")))
    assert by_name.evaluation.metrics == pytest.approx(by_number.evaluation.metrics, nan_ok=True)
    true = {line[1] for picture in by_name.sections[0].pictures for line in picture.caption}
    assert true and true <= set(digits)
    scores = by_number.evaluation.scores
    wrong = scores["confidence"][~scores["correct"]].sort(descending=True).values
    assert len(wrong) > MISTAKES
    found = find_mistakes(model, known, by_number.evaluation, by_number.request)
    shown = torch.tensor([mistake.confidence for mistake in found])
    assert_close(shown, wrong[:MISTAKES])


def test_the_command_prints_a_table_and_writes_a_report(capsys, mlp, data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["evaluate", str(mlp), "--data-root", str(data_root), "--ood", "fashion-mnist", "--num-samples", "2"]
    assert main([*words, "--limit", "50", "--report", str(tmp_path / "new/out")]) == 0
    out, error = capsys.readouterr()
    assert "on mnist" in out and "fashion-mnist/auroc_entropy" in out and "written to" in out and not error
    assert sorted(file.name for file in (tmp_path / "new/out").iterdir()) == ["report.html", "report.json"]
    page = Reader((tmp_path / "new/out/report.html").read_text())
    assert "50 examples, predicted by 2 draws" in page.text and "--limit 50" in page.text
    before = (tmp_path / "new/out/report.json").read_text()
    for place in (data_root, tmp_path, mlp.parent):
        assert str(place) not in page.text and str(place) not in before
    assert main([*words, "--limit", "50", "--json"]) == 0
    assert capsys.readouterr().out == before
    assert main([*words, "--limit", "50", "--json", "--method", "mean"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_samples"] == 1 and found["metrics"]["accuracy"] <= 1


def test_corruptions_are_measured_in_order_and_drawn(capsys, mlp, data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["evaluate", str(mlp), "--data-root", str(data_root), "--num-samples", "2", "--limit", "20", "--seed", "3"]
    words += ["--batch-size", "8", "--corruptions", "fog, contrast"]
    assert main([*words, "--report", str(tmp_path / "out")]) == 0
    out, error = capsys.readouterr()
    assert "severity" in out and "Means over 2 kinds of corruption." in out and "corruptions.png" in out and not error
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "corruptions.png",
        "report.html",
        "report.json",
    ]
    with Image.open(tmp_path / "out/corruptions.png") as picture:
        assert picture.width > 1000
    page = Reader((tmp_path / "out/report.html").read_text())
    assert "Corrupted images" in page.text and "--batch-size 8 --corruptions fog,contrast" in page.text
    pictures = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert "Quality of corrupted images" in pictures
    known = load_split("mnist", data_root, train=False).limited(20)
    batches = [(known.inputs(slice(k, k + 8)), known.labels[k : k + 8]) for k in (0, 8, 16)]
    expected = bl.evaluate(
        zoo.load(mlp),
        batches,
        corruptions=["fog", "contrast"],
        num_samples=2,
        generator=torch.Generator().manual_seed(3),
    )
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out/report.json").read_text()
    found = json.loads(printed)["corruptions"]
    assert found["kinds"].keys() == {"fog", "contrast"} and found["mean"]["nll"] == pytest.approx(
        expected.corruptions.by_severity()["nll"].tolist()
    )


def test_all_corruptions_are_asked_for_by_the_option_alone(monkeypatch):
    asked = []

    def stop(request, *_, **__):
        asked.append(request)
        raise ValueError("enough")

    monkeypatch.setattr("recipes.tasks.evaluate.evaluate", stop)
    for words, expected in (([], ()), (["--corruptions"], KINDS), (["--corruptions", "snow"], ("snow",))):
        assert main(["evaluate", "lenet5-mnist", *words]) == 1
        assert tuple(asked[-1].corruptions) == expected
    assert EvaluationRequest("net", limit=5, corruptions=KINDS).command() == (
        "bayeslayers evaluate net --limit 5 --corruptions"
    )
    with pytest.raises(ValueError, match=r"corruptions must be kinds of corruption, got 'snwo'\. Did you mean 'snow'"):
        check_request(EvaluationRequest("net", corruptions=["snwo"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "minst"], "unknown data set 'minst'. Did you mean 'mnist'"),
        (["--ood", "npz:no/such.npz"], "ood must be an .npz file, got no/such.npz"),
        (["--ood", "npz:{tmp}/colour.npz"], "must be grey as the model takes them, got RGB ones"),
        (["--data", "npz:{tmp}/many.npz"], "target must hold classes from 0 to 9, got 10"),
        (["--limit", "0"], "limit must be an integer >= 1, got 0"),
        (["--num-samples", "0"], "num_samples must be an integer >= 1, got 0"),
        (["--batch-size", "-1"], "batch_size must be an integer >= 1, got -1"),
        (["--report", "{tmp}/colour.npz"], "report must be a folder, got .*, which is a file"),
        (["--data-root", "{tmp}"], "data root must hold MNIST"),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(capsys, mlp, data_root, tmp_path, options, message):
    np.savez(tmp_path / "colour.npz", images=np.zeros((2, 28, 28, 3), np.uint8), labels=np.array([0, 1]))
    np.savez(tmp_path / "many.npz", images=np.zeros((2, 28, 28), np.uint8), labels=np.array([0, 10]))
    before = sorted(tmp_path.iterdir())
    words = [word.replace("{tmp}", str(tmp_path)) for word in options]
    places = ["--data-root", str(data_root), "--report", str(tmp_path / "out")]
    assert main(["evaluate", str(mlp), *places, "--num-samples", "2", *words]) == 1
    out, error = capsys.readouterr()
    assert error.startswith("bayeslayers: ") and error.count("\n") == 1 and not out
    assert re.search(message, error), error
    assert sorted(tmp_path.iterdir()) == before


def test_posteriors_that_are_none_of_image_classes_are_refused(tmp_path):
    model = zoo.create("mlp", widths=[2])
    bl.save_posterior(model, tmp_path / "real", likelihood="gaussian")
    bl.save_posterior(model, tmp_path / "unnamed")
    bl.save_posterior(model, tmp_path / "named", class_names=["yes", "no"])
    flat = zoo.create("mlp", widths=[2], input_size=[7])
    bl.save_posterior(flat, tmp_path / "flat", dataset="mnist")
    np.savez(tmp_path / "data.npz", images=np.zeros((3, 28, 28), np.uint8), labels=np.arange(3))
    for name, message in (
        ("real", "posterior must be one of classes, got a gaussian one"),
        ("unnamed", "posterior's card must name its data set, got none. Give --data"),
        ("flat", r"posterior must take images, got one for inputs of shape \(7,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(EvaluationRequest(str(tmp_path / name)))
    with pytest.raises(ValueError, match="data must have the posterior's 2 classes, got 3: 0, 1, 2"):
        evaluate(EvaluationRequest(str(tmp_path / "named"), f"npz:{tmp_path}/data.npz"))


def test_a_report_that_cannot_be_made_leaves_the_old_one(tmp_path, monkeypatch):
    result = a_result()
    write_report(result, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    bad = Mistake(torch.zeros(1), "a", "b", 0.5)
    with pytest.raises((IndexError, TypeError, ValueError)):
        write_report(dataclasses.replace(result, sections=[mistakes_section([bad])]), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_thumbnails_are_the_images():
    image = torch.randint(256, (3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    *_, picture = Reader(report_html(a_result(mistakes=[Mistake(image, "a", "b", 0.5)]))).pictures()
    assert_close(torch.from_numpy(np.array(picture)).permute(2, 0, 1), image, rtol=0, atol=0)
