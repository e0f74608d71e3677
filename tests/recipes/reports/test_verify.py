from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import bayeslayers as bl
import zoo
from bayeslayers.storage.posterior import read_card
from recipes.cli import main
from recipes.data import clauses
from recipes.data.slices import SLICES, Points, load_slice, save_slice, write_slice
from recipes.data.split import Split
from recipes.reports.verify import MAX_SAMPLES, Check, _draw_blocks, _pool, compare, measure, record, verify
from recipes.tasks.classification import train
from recipes.tasks.images import Config
from recipes.tasks.text import TEST_SEED
from recipes.training.config import Evaluation

NAME = "mlp-mnist"  # the faster of the two


@pytest.fixture(scope="module")
def trained(data_root, tmp_path_factory):
    """A small posterior, measured on 60 of the 100 test images of the synthetic MNIST."""
    output = tmp_path_factory.mktemp("run") / "tiny"
    train(
        Config(
            name="tiny",
            model={"name": "mlp", "widths": [8]},
            data="mnist",
            optimizer={"name": "vogn", "lr": 0.02, "init_precision": 1000.0},
            batch_size=60,
            epochs=4,
            evaluation=Evaluation(num_samples=32, epoch_samples=2, ood=["fashion-mnist"]),
            output=str(output),
            data_root=str(data_root),
            limit=60,
        )
    )
    return output / "posterior"


@pytest.fixture(scope="module")
def split():
    g = torch.Generator().manual_seed(0)
    return Split(torch.randint(256, (40, 1, 4, 4), generator=g), torch.randint(3, (40,), generator=g), [])


@pytest.fixture(scope="module")
def net():
    net = zoo.create("mlp", widths=[6], input_size=[1, 4, 4], num_classes=3)
    for number, site in enumerate(bl.posterior(net)):
        site.mean.data.normal_(std=0.7, generator=torch.Generator().manual_seed(number))
        site.precision.fill_(10.0)
    return net


def tampered(folder, change):
    """A posterior with the card of the bundled one and changed weights."""
    model = zoo.load(NAME)
    with torch.no_grad():
        for site in bl.posterior(model):
            change(site)
    bl.save_posterior(model, folder, name=NAME)
    return folder


def test_every_bundled_posterior_does_what_its_card_says(capsys):
    assert main(["verify", "--all", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["posterior"] for row in rows} == set(zoo.list_posteriors())
    assert {"ood_auroc_fashion-mnist", "ood_auroc_ring"} <= {row["metric"] for row in rows}
    for name in zoo.list_posteriors():
        metrics = {row["metric"] for row in rows if row["posterior"] == name}
        real = read_card(zoo.resolve(name)).likelihood == "gaussian"
        assert ({"rmse", "nll", "mixture_nll"} if real else {"accuracy", "nll", "ece"}) <= metrics
        assert {"test_examples", "num_samples", "seed"} <= set(read_card(zoo.resolve(name)).verification)
    assert all(row["ok"] for row in rows)


def test_another_seed_is_within_the_tolerance():
    checks = verify(NAME, seed=7)
    assert all(check.ok for check in checks)
    assert sum(check.claimed != round(check.measured, 5) for check in checks) >= 8


NOISE = torch.Generator().manual_seed(5)


@pytest.mark.parametrize(
    ("change", "metrics"),
    [
        (
            lambda site: site.mean.mul_(1 + 0.05 * torch.randn(site.mean.shape, generator=NOISE)),
            {"nll_at_means", "total_fashion-mnist_at_means", "kl"},
        ),
        (lambda site: site.precision.div_(10), {"nll", "brier", "total", "epistemic", "epistemic_fashion-mnist", "kl"}),
    ],
    ids=["means by 5 %", "precisions by 10"],
)
def test_changed_weights_are_found_out(change, metrics, tmp_path, capsys):
    folder = tampered(tmp_path / "posterior", change)
    assert main(["verify", str(folder), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert metrics <= {row["metric"] for row in rows if not row["ok"]}


def test_a_number_that_json_has_not_is_null(monkeypatch, capsys):
    check = Check("tiny", "mnist slice", "nll", 0.5, math.nan, math.inf)
    monkeypatch.setattr("recipes.reports.verify.verify", lambda *_: [check])
    assert main(["verify", "tiny", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (row["claimed"], row["measured"], row["tolerance"], row["ok"]) == (0.5, None, None, False)


def test_metrics_on_the_data_are_the_cards_to_rounding(trained, data_root, tmp_path):
    assert not read_card(trained).verification
    model = zoo.load(trained)
    bl.save_posterior(model, tmp_path / "whole", metrics={**model.card.metrics, "test_examples": 100})
    checks = verify(trained, data_root)
    assert {check.data for check in checks} == {"mnist"} and len(checks) == 7
    assert all(check.ok for check in checks)  # of 60 examples, measured on 100
    whole = {check.metric: check.tolerance for check in verify(tmp_path / "whole", data_root)}
    assert all(check.tolerance > whole[check.metric] for check in checks if check.metric in ("nll", "brier"))


def test_the_same_seed_gives_the_same_figures(trained, data_root, tmp_path):
    model = zoo.load(trained)
    first = {check.metric: check.measured for check in verify(trained, data_root)}
    settings = {key: model.card.metrics[key] for key in ("num_samples", "seed")}
    bl.save_posterior(model, tmp_path / "again", metrics=first | settings | {"test_examples": 100})
    for check in verify(tmp_path / "again", data_root):
        assert_close(check.measured, check.claimed, rtol=1e-6, atol=0)
    for key, value in (("nll", 2 * first["nll"]), ("ood_auroc_fashion-mnist", 0.999), ("iou", 0.5)):
        bl.save_posterior(model, tmp_path / "false", metrics=first | settings | {"test_examples": 100, key: value})
        assert [check.metric for check in verify(tmp_path / "false", data_root) if not check.ok] == [key]


def test_blocks_of_draws_are_those_of_one_prediction(net, split):
    for num_samples in (2, 16, 37):
        whole = bl.predict(net, split.inputs(slice(None)), num_samples, generator=torch.Generator().manual_seed(3))
        blocks = _draw_blocks(net, split, num_samples, 3)
        pooled = _pool(blocks, torch.tensor([float(block.num_samples) for block in blocks]).double())
        assert sum(block.num_samples for block in blocks) == num_samples
        for part in ("mean", "total", "aleatoric", "epistemic"):
            assert_close(getattr(pooled, part).float(), getattr(whole, part), rtol=1e-5, atol=1e-6)


def test_a_pooled_certainty_is_no_more_than_one():
    certain = bl.Prediction(torch.ones(1, 1), *[torch.zeros(1, 1)] * 4, 1, bl.Bernoulli())
    for seed in range(20):
        counts = torch.randint(7, (16,), generator=torch.Generator().manual_seed(seed)).double()
        assert _pool([certain] * 16, counts).total == 0


def test_errors_are_told_from_right_predictions_by_their_uncertainty(net, split):
    key = "misclassification_auroc_confidence"
    metrics, deviations = measure(net, split, {}, 16, 0)
    prediction = bl.predict(net, split.inputs(slice(None)), 16, generator=torch.Generator().manual_seed(0))
    right = prediction.labels == split.labels
    pairs = prediction.confidence[right][:, None] - prediction.confidence[~right][None]
    assert_close(metrics[key], float(((pairs > 0).double() + (pairs == 0).double() / 2).mean()), rtol=1e-6, atol=0)
    assert 0 < deviations[key] < 0.5
    flawless = Split(split.images, prediction.labels, [])
    assert math.isnan(measure(net, flawless, {}, 16, 0)[0][key])


def test_the_tolerance_is_the_spread_over_seeds(net, split):
    keys = ("nll", "brier", "total", "epistemic")
    runs = [measure(net, split, {}, 32, seed) for seed in range(25)]
    for key in keys:
        values, deviations = (torch.tensor([run[part][key] for run in runs]).double() for part in (0, 1))
        ratio = float(deviations.square().mean() / (2 * values.var()))
        assert 0.5 < ratio < 2, (key, ratio)  # of variances; that of 25 values has a standard error of 29 %


def test_the_tolerance_for_a_part_of_the_examples_is_the_spread_over_parts(net, split):
    half = len(split) // 2
    metrics, deviations = measure(net, split, {}, 64, 0, of=half)
    allowed = deviations["nll"] ** 2 - measure(net, split, {}, 64, 0)[1]["nll"] ** 2
    prediction = bl.predict(net, split.inputs(slice(None)), 64, generator=torch.Generator().manual_seed(0))
    losses = -prediction.probs.gather(1, split.labels[:, None]).log().squeeze(1)
    g = torch.Generator().manual_seed(0)
    means = torch.stack([losses[torch.randperm(len(losses), generator=g)[:half]].mean() for _ in range(2000)])
    assert_close(metrics["nll"], float(losses.mean()), rtol=1e-5, atol=0)
    assert 0.5 < allowed / float(means.var()) < 2


def test_recording_keeps_the_weights_and_everything_else_of_the_card(tmp_path):
    model = zoo.load(NAME)
    bl.save_posterior(
        model, tmp_path / "copy", name=NAME, verification={}, metrics={**model.card.metrics, "num_samples": 4}
    )
    before = read_card(tmp_path / "copy")
    (tmp_path / "copy" / "picture.png").write_bytes(b"a picture")
    after = record(tmp_path / "copy")
    assert (tmp_path / "copy" / "picture.png").read_bytes() == b"a picture"
    assert f"![Picture of {NAME}](picture.png)" in (tmp_path / "copy" / "README.md").read_text()
    assert after == read_card(tmp_path / "copy") and after.sha256 == before.sha256 == model.card.sha256
    assert (after.name, after.metrics, after.notes) == (before.name, before.metrics, before.notes)
    assert after.verification["test_examples"] == 300 and after.verification["num_samples"] == 4
    assert all(check.ok for check in verify(tmp_path / "copy"))


def test_a_posterior_of_one_draw_is_recorded_with_more(tmp_path):
    model = zoo.load(NAME)
    bl.save_posterior(model, tmp_path / "copy", name=NAME, verification={}, metrics={"nll": 0.05, "num_samples": 1})
    assert record(tmp_path / "copy").verification["num_samples"] == 64
    assert all(check.ok for check in verify(tmp_path / "copy"))


def test_a_slice_has_no_more_examples_and_classes_than_it_can_hold(data_root, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.data.slices.SLICES", tmp_path)
    with pytest.raises(ValueError, match="count must be from 1 to the 100 examples of mnist, got 300"):
        write_slice("mnist", data_root)
    with pytest.raises(ValueError, match=r"labels must be < 256 for a slice, .* got 256"):
        save_slice("many", Points(torch.rand(2, 1), torch.tensor([0, 256])))
    assert list(tmp_path.iterdir()) == []


def test_ood_sets_that_nobody_has_are_not_measured(trained, data_root, tmp_path):
    model = zoo.load(trained)
    claimed = model.card.metrics | {"ood_auroc_martians": 0.9, "ood_auroc_martians_epistemic": 0.9}
    bl.save_posterior(model, tmp_path / "copy", name=model.card.name, metrics=claimed)
    checks = verify(tmp_path / "copy", data_root)
    unknown = [check for check in checks if "martians" in check.metric]
    assert [(check.measured, check.ok) for check in unknown] == [(None, False)] * 2
    assert [check for check in checks if check not in unknown] == verify(trained, data_root)
    recorded = record(tmp_path / "copy").verification
    assert "ood_auroc_fashion-mnist" in recorded and not [key for key in recorded if "martians" in key]


def test_slices_are_small_and_spread_over_the_classes():
    assert sum(path.stat().st_size for path in SLICES.iterdir()) < 1_600_000
    for name, shape in (
        ("mnist", (300, 1, 28, 28)),
        ("fashion-mnist", (300, 1, 28, 28)),
        ("cifar10", (200, 3, 32, 32)),
    ):
        split = load_slice(name)
        assert split.images.shape == shape and split.images.dtype == torch.uint8
        assert split.labels.bincount(minlength=10).min() >= 14


def test_a_slice_of_sentences_keeps_their_ids_in_two_bytes(tmp_path, monkeypatch):
    bundled, stored = load_slice("clauses"), load_file(SLICES / "clauses.safetensors")
    assert stored["x"].dtype == torch.int16 and bundled.x.dtype == torch.long and bundled.x.shape == (300, 18)
    monkeypatch.setattr("recipes.data.slices.SLICES", tmp_path)
    save_slice("copy", Points(bundled.x, bundled.labels))
    assert_close(load_slice("copy").x, bundled.x)
    sentences = clauses.sentences(4000, TEST_SEED)
    assert_close(bundled.x, sentences.x[torch.arange(300) * 13])


def test_a_slice_is_every_kth_example(data_root, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.data.slices.SLICES", tmp_path)
    write_slice("mnist", data_root, 25)
    assert_close(load_slice("mnist").labels, torch.arange(0, 100, 4) % 10)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": {}}, "card of 'tiny' must claim metrics, got none"),
        ({"dataset": "../../mnist (1 train)"}, r"unknown data set '../../mnist'"),
        ({"metrics": {"nll": 0.1, "num_samples": MAX_SAMPLES + 1}}, "num_samples must be from 2 to 10000, got 10001"),
        ({"metrics": {"nll": 0.1, "num_samples": 1}}, "num_samples must be from 2"),
        ({"likelihood": "gaussian"}, "must be categorical"),
        ({"likelihood": "bernoulli"}, r"must be categorical .* got bernoulli of shape \(100, 10\)"),
        ({"verification": {"nll": 0.1}, "dataset": "../slices/mnist"}, "bundled slice, got '../slices/mnist'"),
    ],
)
def test_what_cannot_be_verified_is_one_sentence(trained, data_root, tmp_path, capsys, fields, message):
    bl.save_posterior(zoo.load(trained), tmp_path / "bad", **{"name": "tiny"} | fields)
    with pytest.raises(ValueError, match=message):
        verify(tmp_path / "bad", data_root)
    assert main(["verify", str(tmp_path / "bad"), "--data-root", str(data_root)]) == 1
    assert capsys.readouterr().err.startswith("bayeslayers: ")


def test_the_command_shows_a_table_and_takes_one_or_all(trained, data_root, capsys):
    assert main(["verify", str(trained), "--data-root", str(data_root)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("tiny on mnist\n") and "brier" in out and "tolerance" in out
    for words in ([], [NAME, "--all"]):
        with pytest.raises(SystemExit):
            main(["verify", *words])
    assert "required" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a bundled name or a folder to record in, got 'owner/repo'"):
        record("owner/repo")


def test_a_metric_that_was_not_measured_is_not_confirmed():
    assert Check("a", "b", "nll", 0.5, 0.5, 0.0).ok
    assert not Check("a", "b", "iou", 0.5, None, 1.0).ok
    assert not Check("a", "b", "nll", 0.5, math.nan, 1.0).ok


@pytest.mark.parametrize("value", [math.inf, math.nan, -1, 2.5, 2**70])
@pytest.mark.parametrize("name", ["num_samples", "seed", "test_examples"])
def test_the_settings_of_a_claim_are_whole_numbers_within_bounds(name, value):
    model = zoo.load("lenet5-mnist")
    claimed = {"nll": 0.1, "num_samples": 2, "seed": 0, "test_examples": 10, name: value}
    with pytest.raises(ValueError, match=rf"card's {name} must be from \d+ to \d+, got "):
        compare(model, claimed, load_slice("mnist", [1, 28, 28]), {}, "mnist")
