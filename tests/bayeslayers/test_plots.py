from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers import plots
from bayeslayers.evaluate import Evaluation
from bayeslayers.metrics import Reliability, RiskCoverage
from bayeslayers.plots.canvas import COLOURS, palette, rendered, short
from bayeslayers.plots.functions import _margins

NAN = math.nan
RELIABILITY = Reliability(
    edges=torch.linspace(0, 1, 6),
    confidence=torch.tensor([NAN, 0.3, 0.5, NAN, 0.9]),
    accuracy=torch.tensor([NAN, 0.1, 0.5, NAN, 1.0]),
    count=torch.tensor([0, 10, 10, 0, 80]),
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scores(n, seed):
    values = torch.rand(n, 4, generator=generator(seed))
    return dict(zip(("confidence", "entropy", "epistemic", "aleatoric"), values.T, strict=True))


def an_evaluation(**changes):
    fields = {
        "likelihood": "categorical",
        "num_examples": 100,
        "num_samples": 4,
        "metrics": {"ece": 0.04, "aurc": 0.01, "far/auroc_entropy": 0.75},
        "reliability": RELIABILITY,
        "risk_coverage": RiskCoverage(torch.tensor([0.2, 0.6, 1.0]), torch.tensor([0.0, 0.05, 0.14])),
        "scores": scores(100, 0) | {"correct": torch.ones(100, dtype=torch.bool)},
        "ood": {"far": scores(50, 1), "near": scores(70, 2)},
    }
    return Evaluation(**fields | changes)


def network(outputs, inputs=2):
    torch.manual_seed(0)
    layers = bl.BayesLinear(inputs, 6, init_precision=5.0), nn.Tanh(), bl.BayesLinear(6, outputs, init_precision=5.0)
    return nn.Sequential(*layers)


def words(figure):
    """All text of a figure."""
    return [text.get_text() for text in figure.findobj(Text)]


def assert_labelled(figure, panels):
    """Every panel but colour bars and hidden ones has a title or the figure has, and axes with names."""
    shown = [axis for axis in figure.axes if axis.get_visible() and axis.axison and not hasattr(axis, "_colorbar")]
    assert len(shown) == panels
    assert any(axis.get_xlabel() for axis in shown)
    assert any(axis.get_ylabel() for axis in shown) or figure.get_supylabel()
    assert figure.get_suptitle() or any(axis.get_title() or axis.get_title(loc="left") for axis in shown)


def assert_nothing_overlaps(figure):
    """No two panels, with what is written at them, share a place, nor is any cut off by the edge."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    axes = [axis for axis in figure.axes if axis.get_visible() and axis.axison]
    boxes = [axis.get_tightbbox(renderer) for axis in axes] + [
        legend.get_window_extent(renderer) for legend in figure.legends
    ]
    width, height = canvas.get_width_height()
    for k, box in enumerate(boxes):
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, (k, box)
        for other in boxes[:k]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            up = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(across, up) < 1.5, (box, other)


def test_reliability_bars_are_the_bins_and_empty_ones_are_left_out():
    figure = plots.reliability_diagram(an_evaluation())
    diagram, histogram = figure.axes
    bars = sorted((bar.get_x(), bar.get_y(), bar.get_height(), bar.get_width()) for bar in diagram.patches)
    expected = [
        (0.2, 0.0, 0.1, 0.2),  # accuracy
        (0.2, 0.1, 0.2, 0.2),  # the gap up to the confidence
        (0.4, 0.0, 0.5, 0.2),
        (0.4, 0.5, 0.0, 0.2),
        (0.8, 0.0, 1.0, 0.2),
        (0.8, 0.9, 0.1, 0.2),
    ]
    assert_close(np.array(bars), np.array(expected), rtol=0, atol=1e-6)
    heights = [bar.get_height() for bar in histogram.patches]
    assert_close(torch.tensor(heights, dtype=torch.float32), torch.tensor([0.1, 0.1, 0.8]), rtol=1e-6, atol=0)
    assert [text.get_text() for text in histogram.texts] == ["10", "10", "80"]  # examples in each bin
    assert "Reliability (ECE 0.0400)" in words(figure) and "mean accuracy 0.860" in words(figure)
    assert_labelled(figure, 2)
    assert_nothing_overlaps(figure)


def test_a_risk_coverage_curve_is_drawn_per_model_and_rises_from_zero_where_all_is_right():
    right = an_evaluation(risk_coverage=RiskCoverage(torch.tensor([1.0]), torch.tensor([0.0])), metrics={})
    figure = plots.risk_coverage_curve({"one": an_evaluation(), "a $name$ that is far too long to be shown": right})
    (axis,) = figure.axes
    first, second = axis.lines
    assert_close(first.get_xydata(), np.array([[0.2, 0.0], [0.6, 0.05], [1.0, 0.14]]), rtol=1e-6, atol=0)
    assert second.get_xydata().tolist() == [[1.0, 0.0]] and second.get_marker() == "o"
    assert first.get_color() != second.get_color() and "one, AURC 0.01" in words(figure)
    assert_labelled(figure, 1)
    assert_nothing_overlaps(figure)
    assert plots.risk_coverage_curve(right).axes[0].get_ylim() == (0, 0.01)
    many = plots.risk_coverage_curve({str(k): an_evaluation() for k in range(20)})
    assert len({(line.get_color(), line.get_linestyle()) for line in many.axes[0].lines}) == 20
    assert_nothing_overlaps(many)


@pytest.mark.parametrize("score", ["entropy", "confidence"])
def test_score_histograms_share_bins_and_count_every_example(score):
    evaluation = an_evaluation()
    figure = plots.score_histograms(evaluation, score)
    edges = np.linspace(0, max(float(s[score].max()) for s in (evaluation.scores, *evaluation.ood.values())), 41)
    for axis, values in zip(figure.axes, (evaluation.scores, *evaluation.ood.values()), strict=True):
        heights = np.array([bar.get_height() for bar in axis.patches])
        assert_close(heights, np.histogram(values[score].double(), edges)[0] / len(values[score]))
        assert heights.sum() == pytest.approx(1)
    assert figure.get_supylabel() == "share of examples (square-root scale)"
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[0] == "known: 100 examples" and ("AUROC 0.750" in titles[1]) == (score == "entropy")
    assert_labelled(figure, 3)
    assert_nothing_overlaps(figure)


def test_scores_that_are_all_equal_have_a_histogram_too():
    same = {"entropy": torch.zeros(5)}
    (axis,) = plots.score_histograms(an_evaluation(scores=same, ood={})).axes
    assert [bar.get_height() for bar in axis.patches] == [1.0] + [0.0] * 39


def test_figures_of_an_evaluation_without_them_are_refused():
    real = an_evaluation(likelihood="gaussian", reliability=None, risk_coverage=None)
    with pytest.raises(ValueError, match="evaluation must be of classes to have a reliability, got a gaussian one"):
        plots.reliability_diagram(real)
    with pytest.raises(ValueError, match="must be of classes to have a risk, got a gaussian one"):
        plots.risk_coverage_curve(real)
    with pytest.raises(ValueError, match="evaluations must hold one or more, got none"):
        plots.risk_coverage_curve({})
    with pytest.raises(ValueError, match=r"score must be one of .*, got 'entropie'\. Did you mean 'entropy'"):
        plots.score_histograms(an_evaluation(), "entropie")
    with pytest.raises(ValueError, match="got 'correct'"):  # OOD examples have no label
        plots.score_histograms(an_evaluation(), "correct")


def test_margins_are_zero_where_the_most_probable_class_changes():
    probs = torch.rand(500, 4, generator=generator()).softmax(1)
    for k, margin in enumerate(_margins(probs), start=1):
        assert_close(margin > 0, probs.argmax(1) == k)
        others = probs.clone()
        others[:, k] = -1
        assert_close(margin, probs[:, k] - others.amax(1))
    (margin,) = _margins(probs[:, :1])
    assert_close(margin, probs[:, 0] - 0.5)
    assert_close(_margins(probs[:, 0])[0], margin)


def boundary_of(axis, line):
    """The points of the contour that has this line width."""
    (found,) = [drawn for drawn in axis.collections if drawn.get_linewidths()[0] == line and hasattr(drawn, "levels")]
    return np.concatenate([path.vertices for path in found.get_paths()])


def test_the_boundary_of_a_linear_network_is_its_line():
    class Line(nn.Module):
        """Of w x = b, certain of its weights."""

        def __init__(self):
            super().__init__()
            self.layer = bl.BayesLinear(2, 1, init_precision=1e10)
            nn.init.constant_(self.layer.weight, 1.0)
            nn.init.constant_(self.layer.bias, -0.5)

        def forward(self, x):
            return self.layer(x)

    x = torch.rand(30, 2, generator=generator())
    y = (x.sum(1) > 0.5).long()
    figure = plots.decision_boundary(
        Line(), x, y, draws=3, baseline=Line(), likelihood=bl.Bernoulli(), num_samples=2, generator=generator()
    )
    for width in (2.2, 2.0):  # the posterior predictive's, the baseline's
        points = boundary_of(figure.axes[0], width)
        assert len(points) > 50
        assert_close(points.sum(1), np.full(len(points), 0.5), rtol=0, atol=0.02)
    assert len([c for c in figure.axes[0].collections if hasattr(c, "levels")]) == 3 + 2
    map_ = figure.axes[1].images[0]
    assert map_.get_clim() == (0, pytest.approx(math.log(2)))
    assert "deterministic" in words(figure)


def test_a_decision_boundary_shows_the_entropy_of_both_networks():
    x, y, baseline = torch.randn(9, 2, generator=generator()), torch.arange(9) % 2, network(2)
    nn.init.constant_(baseline[0].bias, 0.5)  # another network
    figure = plots.decision_boundary(
        network(2),
        x,
        y,
        draws=2,
        baseline=baseline,
        num_samples=3,
        names=("VOGN", "Adam"),
        title="epoch 3",
        grid=12,
        generator=generator(),
    )
    decisions, ours, other = figure.axes[:3]
    assert [axis.get_title() for axis in figure.axes[:3]] == ["Decision boundary", "Entropy, VOGN", "Entropy, Adam"]
    assert figure.get_suptitle() == "epoch 3" and {"VOGN", "Adam"} <= set(words(figure))
    west, east, south, north = other.images[0].get_extent()
    points = torch.cartesian_prod(torch.linspace(west, east, 12), torch.linspace(south, north, 12))
    expected = torch.special.entr(baseline(points).softmax(1)).sum(1).view(12, 12).T.detach().double()
    assert_close(torch.as_tensor(other.images[0].get_array()), expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(ours.images[0].get_array(), other.images[0].get_array())
    assert decisions.get_shared_x_axes().joined(decisions, other)
    assert_nothing_overlaps(figure)


@pytest.mark.parametrize("classes", [2, 3, 11])
def test_a_decision_boundary_has_room_for_its_classes(classes):
    x, y = torch.randn(4 * classes, 2, generator=generator()), torch.arange(4 * classes) % classes
    names = ["_a name with $signs$ that is too long for any legend"] + [str(k) for k in range(1, classes)]
    figure = plots.decision_boundary(
        network(classes), x, y, draws=2, num_samples=2, class_names=names, generator=generator()
    )
    assert figure.axes[1].images[0].get_clim()[1] == pytest.approx(math.log(classes))
    styles = {
        (c.get_facecolor().tobytes(), c.get_paths()[0].vertices.tobytes())
        for c in figure.axes[0].collections
        if not hasattr(c, "levels")
    }
    assert len(styles) == classes
    assert_labelled(figure, 2)
    assert_nothing_overlaps(figure)


def test_a_decision_boundary_takes_only_two_inputs_and_named_classes():
    x, y = torch.randn(6, 2), torch.arange(6) % 3
    for arguments, options, message in (
        ((torch.randn(6, 3), y), {}, r"x must hold two inputs .* got shape \(6, 3\)"),
        ((x[:5], y), {}, "for each of the 6 classes in y"),
        ((x, y), {"class_names": ["a"]}, "class_names must name the classes 0 to 2, got 1 names"),
        ((x, y), {"draws": 0}, "draws must be an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.decision_boundary(network(3), *arguments, **options)


def a_regression(n, shape):
    mean, noise, epistemic = torch.randn(n, 3, generator=generator()).abs().T.reshape(3, *shape)
    likelihood = bl.Gaussian()
    return bl.Prediction(mean, noise + epistemic, noise, epistemic, mean, 4, likelihood)


@pytest.mark.parametrize("shape", [(9,), (9, 1)])
def test_regression_bands_are_two_standard_deviations_in_the_order_of_the_inputs(shape):
    x, prediction = torch.randn(shape, generator=generator(1)), a_regression(9, shape)
    figure = plots.regression_bands(x, prediction, torch.zeros(2), torch.ones(2))
    (axis,) = figure.axes
    order = x.flatten().argsort()
    mean, total, epistemic, aleatoric = (
        getattr(prediction, key).flatten()[order].double() for key in ("mean", "total", "epistemic", "aleatoric")
    )
    for band, variance in zip(axis.collections, (total, epistemic), strict=False):
        outline = band.get_paths()[0].vertices
        for side in (mean - 2 * variance.sqrt(), mean + 2 * variance.sqrt()):
            for at, value in zip(x.flatten()[order].tolist(), side.tolist(), strict=True):
                assert np.abs(outline - [at, value]).max(1).min() < 1e-6
    lower, middle, upper = (torch.tensor(line.get_ydata()) for line in axis.lines)
    assert_close(middle, mean)
    assert_close((upper - lower) / 4, aleatoric.sqrt())
    assert_labelled(figure, 1)
    assert_nothing_overlaps(figure)


def test_regression_bands_refuse_classes_and_several_outputs():
    with pytest.raises(ValueError, match=r"one real target for each of the 9 inputs, got gaussian of shape \(9, 2\)"):
        plots.regression_bands(torch.zeros(9), a_regression(18, (9, 2)))
    with pytest.raises(ValueError, match="x_train and y_train must be given together"):
        plots.regression_bands(torch.zeros(9), a_regression(9, (9,)), torch.zeros(2))


def a_segmentation(classes, n=2, h=6, w=8):
    probs = torch.randn(n, classes, h, w, generator=generator()).mul(3).softmax(1)
    total = torch.special.entr(probs).sum(1)
    prediction = bl.Prediction(probs, total, 0.7 * total, 0.3 * total, probs, 4, bl.Categorical())
    return torch.rand(n, 3, h, w, generator=generator()), probs.argmin(1), prediction


@pytest.mark.parametrize("classes", [2, 11])
def test_segmentation_panels_show_labels_predictions_and_uncertainties(classes):
    images, targets, prediction = a_segmentation(classes)
    targets[:, 0] = 255
    names = [f"a class with a long name, number {k}" for k in range(classes)]
    colours = np.array([[k / 20, 0.5, 0.5] for k in range(classes)])
    figure = plots.segmentation_panels(
        images, targets, prediction, class_names=names, palette=[tuple(c) for c in colours], ignore_index=255
    )
    panels = [axis.images[0].get_array() for axis in figure.axes[:10]]
    assert_close(np.asarray(panels[0]), images[0].permute(1, 2, 0).double().numpy())
    assert_close(np.asarray(panels[6])[1:], colours[targets[1, 1:]])
    assert_close(np.asarray(panels[7]), colours[prediction.labels[1]])
    assert_close(np.asarray(panels[3]), prediction.total[0].double().numpy())
    assert_close(np.asarray(panels[9]), prediction.epistemic[1].double().numpy())
    assert figure.axes[3].images[0].get_clim() == (0, pytest.approx(math.log(classes)))
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend == [short(name) for name in names] + ["ignored"]
    assert [axis.get_title() for axis in figure.axes[:5]] == [
        "image", "label", "prediction", "entropy", "mutual information",
    ]  # fmt: skip
    assert_nothing_overlaps(figure)


def test_segmentation_panels_take_yes_or_no_and_grey_images():
    probs = torch.rand(1, 1, 6, 8, generator=generator())
    prediction = bl.Prediction(probs, probs, probs, 0 * probs, probs, 1, bl.Bernoulli())
    figure = plots.segmentation_panels(torch.rand(1, 1, 6, 8), (probs > 0.5).long()[:, 0], prediction)
    assert {text.get_text() for text in figure.legends[0].texts} == {"0", "1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(2, 5, 8)}, r"must be classes of shape \(2, 6, 8\) as the images, got \(2, 5, 8\)"),
        ({"targets": torch.full((2, 6, 8), 3)}, "targets must be from 0 to 2, got 3 to 3"),
        ({"class_names": ["a"]}, "an entry for each of 3 classes, got 1 and 3"),
        ({"palette": ["red"]}, "an entry for each of 3 classes, got 3 and 1"),
    ],
)
def test_segmentation_panels_refuse_what_does_not_fit(change, message):
    images, targets, prediction = a_segmentation(3)
    with pytest.raises(ValueError, match=message):
        plots.segmentation_panels(**{"images": images, "targets": targets, "prediction": prediction} | change)


@pytest.mark.parametrize("classes", [4, 30])
def test_predictive_panels_have_room_for_long_names_and_many_classes(classes):
    probs = torch.randn(3, classes, generator=generator()).mul(3).softmax(1)
    total = torch.special.entr(probs).sum(1)
    prediction = bl.Prediction(probs, total, total, 0 * total, probs, 4, bl.Categorical())
    names = [f"class $ {k} of a long name" for k in range(classes)]
    figure = plots.predictive_panels([("three images", torch.rand(3, 3, 5, 5), prediction)], names)
    bars = figure.axes[1 * 3]
    heights = torch.tensor([bar.get_height() for bar in bars.patches], dtype=torch.float32)
    shown = probs[0].topk(min(12, classes)).indices.sort().values
    assert_close(heights, probs[0][shown], rtol=1e-6, atol=0)
    assert bars.get_title().startswith(short(names[int(probs[0].argmax())], 12))
    assert_nothing_overlaps(figure)


def test_predictive_panels_frame_and_name_the_mistakes():
    probs = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3]])
    total = torch.special.entr(probs).sum(1)
    prediction = bl.Prediction(probs, total, total, 0 * total, probs, 4, bl.Categorical())
    rows = [(title, torch.rand(2, 1, 5, 5), prediction) for title in ("labelled", "unknown")]
    figure = plots.predictive_panels(rows, ["cat", "dog", "owl"], targets=[torch.tensor([2, 1]), None])
    pictures, bars = figure.axes[0:2] + figure.axes[4:6], figure.axes[2:4] + figure.axes[6:8]
    assert [axis.get_title() for axis in bars] == ["cat: 90%, is owl", "dog: 50%", "cat: 90%", "dog: 50%"]
    assert [axis.spines.left.get_visible() for axis in pictures] == [True, False, False, False]  # the frame
    assert "Red frame" in figure.get_supxlabel()
    assert "Red frame" not in plots.predictive_panels(rows, ["cat", "dog", "owl"]).get_supxlabel()
    assert_nothing_overlaps(figure)
    for targets in ([torch.tensor([2, 1])], [torch.tensor([2]), None]):
        with pytest.raises(ValueError, match=r"targets must have \[2, 2\] labels, one for each image, or None for"):
            plots.predictive_panels(rows, ["cat", "dog", "owl"], targets=targets)


ROWS = [
    {"epoch": k, "seconds": 3.0, "lr": 0.1 / k, "train_loss": 1 / k, "test_nll": 2 / k, "test_accuracy": 1 - 1 / k}
    for k in range(1, 6)
]


def test_training_curves_are_the_columns_of_the_log():
    text = io.StringIO()
    table = csv.DictWriter(text, ROWS[0])
    table.writeheader()
    table.writerows(ROWS)
    text.seek(0)
    figure = plots.training_curves(list(csv.DictReader(text)))
    drawn = {axis.get_ylabel(): axis.lines[0].get_ydata().tolist() for axis in figure.axes}
    assert drawn["loss (nats)"] == [row["train_loss"] for row in ROWS]
    assert drawn["NLL (nats)"] == [row["test_nll"] for row in ROWS]
    assert list(drawn) == ["loss (nats)", "NLL (nats)", "accuracy", "learning rate"]
    assert_labelled(figure, 4)
    assert_nothing_overlaps(figure)


def test_a_temperature_has_a_panel_where_it_changes():
    def panels(*temperatures):
        rows = [row | {"temperature": t} for row, t in zip(ROWS, temperatures, strict=False)]
        return [axis.get_ylabel() for axis in plots.training_curves({"vogn": rows, "adam": ROWS}).figure.axes]

    assert panels(0.1, 0.1) == ["loss (nats)", "NLL (nats)", "accuracy", "learning rate"]
    assert panels("0.1", "0.2")[-2:] == ["learning rate", "temperature"]


def test_training_curves_compare_runs_and_show_a_single_epoch():
    rows = [row | {"train_accuracy": row["test_accuracy"]} for row in ROWS]
    figure = plots.training_curves({"long": rows, "one epoch": ROWS[:1], "gap": [ROWS[0] | {"test_nll": ""}, ROWS[1]]})
    accuracy = next(axis for axis in figure.axes if axis.get_ylabel() == "accuracy")
    long, other = accuracy.lines[:2]
    assert long.get_color() == other.get_color() and {long.get_linestyle(), other.get_linestyle()} == {"-", "--"}
    single = next(line for line in accuracy.lines if len(line.get_xdata()) == 1)
    assert single.get_marker() == "o" and single.get_color() != long.get_color()
    nll = next(axis for axis in figure.axes if axis.get_ylabel() == "NLL (nats)")
    assert math.isnan(nll.lines[-1].get_ydata()[0])
    for axis in figure.axes:
        assert all(abs(tick - round(tick)) < 1e-9 for tick in axis.get_xticks())
    assert_nothing_overlaps(figure)


@pytest.mark.parametrize("runs", [[], {}, {"a": []}, [{"loss": 1.0}], [{"epoch": 1}]])
def test_training_curves_need_rows_with_an_epoch_and_a_figure(runs):
    with pytest.raises(ValueError, match="runs must hold"):
        plots.training_curves(runs)


def test_signal_to_noise_is_counted_per_layer_in_decibels():
    net = nn.Sequential(bl.BayesLinear(10, 10, bias=False), bl.BayesLinear(10, 2))
    with torch.no_grad():
        net[0].weight.fill_(0.1)
        net[0].weight_precision.fill_(1e4)  # 20 log10(0.1 * 100) = 20 dB
        net[1].weight.fill_(0.1)
        net[1].weight_precision.fill_(1.0)  # -20 dB
        net[1].bias.zero_()  # minus infinity, counted at the lower end, -60 dB
    figure = plots.signal_to_noise(net)
    (axis,) = figure.axes
    filled = sorted(
        (-bar.get_y(), bar.get_x(), bar.get_x() + bar.get_width()) for bar in axis.patches if bar.get_height()
    )
    assert len(filled) == 3
    for (row, left, right), (expected_row, ratio) in zip(filled, [(0, 20), (1, -60), (1, -20)], strict=True):
        assert row == expected_row and left - 1e-6 <= ratio <= right + 1e-6
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1"]
    assert "0% of 100" in words(figure) and "100% of 22" in words(figure)
    assert_labelled(figure, 1)
    assert_nothing_overlaps(figure)
    with pytest.raises(ValueError, match="model must have Bayesian layers"):
        plots.signal_to_noise(nn.Linear(2, 2))


def test_an_animation_has_its_frames_times_and_colours(tmp_path):
    frames = []
    for k in range(5):
        frame = np.full((40, 60, 3), 255, np.uint8)
        frame[:, 10 * k : 10 * k + 10] = (0, 114, 178)
        frames.append(frame)
    path = plots.training_gif(iter(frames), tmp_path / "new/run.gif", duration=0.1, last=2.0)
    with Image.open(path) as animation:
        assert (animation.n_frames, animation.size, animation.info["loop"]) == (5, (60, 40), 0)
        for k in range(5):
            animation.seek(k)
            assert animation.info["duration"] == (2000 if k == 4 else 100)
            assert np.abs(np.int64(animation.convert("RGB")) - frames[k]).max() <= 4
    assert path.stat().st_size < 2000


def test_an_animation_keeps_the_colours_of_thin_lines(tmp_path):
    frame = np.repeat(np.linspace(0, 255, 300).astype(np.uint8)[:, None, None], 400, 1) * np.array([1, 1, 0], np.uint8)
    lines = [tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5)) for colour in COLOURS]
    for number, line in enumerate(lines):
        frame[:, 20 * number] = line
    with Image.open(plots.training_gif([frame], tmp_path / "run.gif")) as animation:
        found = np.asarray(animation.convert("RGB"))
    for number, line in enumerate(lines):
        assert (found[:, 20 * number] == line).all()


def test_an_animation_takes_figures(tmp_path):
    figures = [plots.risk_coverage_curve(an_evaluation(metrics={"aurc": k})) for k in (1, 2)]
    with Image.open(plots.training_gif(figures, tmp_path / "run.gif")) as animation:
        width, height = figures[0].get_size_inches()
        assert animation.n_frames == 2 and animation.size == (round(80 * width), round(80 * height))


def test_an_animation_is_refused_in_one_sentence_and_leaves_nothing(tmp_path):
    frame = np.zeros((4, 4, 3), np.uint8)
    for frames, name, options, message in (
        ([], "a.gif", {}, "frames must be one or more of one size, got no frame"),
        ([frame, frame[:3]], "a.gif", {}, "of one size, got 4 x 4, 4 x 3"),
        ([frame[0]], "a.gif", {}, r"figures or bytes of shape \(h, w, 3\), got uint8 \(4, 3\)"),
        ([frame / 2], "a.gif", {}, "got float64"),
        ([frame], "a.png", {}, "path must end in .gif, got .*a.png"),
        ([frame], "a.gif", {"duration": 0}, "duration must be a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.training_gif(frames, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_written_as_its_path_says(tmp_path, suffix, start):
    path = tmp_path / f"new/picture.{suffix}"
    figure = plots.risk_coverage_curve(an_evaluation(), path)
    assert isinstance(figure, Figure) and path.read_bytes().startswith(start)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if suffix == "png":
        with Image.open(path) as picture:
            assert picture.size == tuple(int(110 * inches) for inches in figure.get_size_inches())
    with Image.open(io.BytesIO(rendered(figure, dpi=50))) as picture:
        assert picture.width == int(50 * figure.get_figwidth())


def test_another_ending_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(
        ValueError, match=r"path must end in .png, .svg or .pdf, got .*picture.pgn\. Did you mean 'png'"
    ):
        plots.risk_coverage_curve(an_evaluation(), tmp_path / "picture.pgn")
    assert not list(tmp_path.iterdir())


def test_colours_are_distinct_and_begin_with_those_of_okabe_and_ito():
    assert palette(8) == list(COLOURS)
    for count in (1, 9, 20, 21, 150):
        assert len(set(palette(count))) == count


def test_names_are_shown_as_they_are():
    assert short("a\n cat") == "a cat" and short("_cat") == " _cat" and short("$x_1$ {") == r"\$x_1\$ {"
    assert short("number 1 of many", 9) == "numb…many" and len(short("x" * 99)) == 28


def test_pictures_leave_pyplot_and_the_global_random_state_alone():
    import matplotlib.pyplot

    net, x = network(2), torch.rand(4, 2, generator=generator())
    before = torch.get_rng_state()
    plots.decision_boundary(net, x, torch.arange(4) % 2, draws=1, num_samples=2, generator=generator())
    assert matplotlib.pyplot.get_fignums() == []
    assert torch.equal(before, torch.get_rng_state())
    assert net.training and not net[0].drawn


def test_an_evaluation_of_a_real_model_can_be_drawn_whole():
    x, y = torch.randn(60, 2, generator=generator()), torch.arange(60) % 3
    evaluation = bl.evaluate(network(3), (x, y), ood={"far": 10 * x}, num_samples=4, generator=generator())
    for draw in (plots.reliability_diagram, plots.risk_coverage_curve, plots.score_histograms):
        assert_nothing_overlaps(draw(evaluation))
