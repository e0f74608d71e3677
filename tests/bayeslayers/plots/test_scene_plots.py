from __future__ import annotations

import math

import pytest
import torch

import bayeslayers as bl
from bayeslayers import plots


@pytest.fixture(scope="module")
def evaluation():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, 6, 6, generator=generator)
    net = bl.BayesConv2d(2, 3, 1)
    torch.nn.init.normal_(net.weight, generator=generator)
    target = torch.distributions.Categorical(logits=net(x).detach().movedim(1, -1)).sample()
    return bl.evaluate(net, (x, target), method="mean")


def test_accuracy_by_confidence_ends_with_all_and_rises_with_the_threshold(evaluation, tmp_path):
    figure = plots.accuracy_by_confidence(evaluation, tmp_path / "curve.png")
    accuracy, kept = (line.get_xydata() for line in figure.axes[0].lines)
    assert accuracy[0, 1] == pytest.approx(evaluation.metrics["accuracy"], abs=1e-6) and kept[0, 1] == 1
    assert accuracy[-1, 1] > accuracy[0, 1] + 0.1
    assert all(before >= after for before, after in zip(kept[:, 1], kept[1:, 1], strict=False))
    count = evaluation.reliability.count
    for (edge, share), number in zip(kept, count.flip(0).cumsum(0).flip(0), strict=True):
        assert share == pytest.approx(float(number / count.sum())) and 0 <= edge < 1
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_accuracy_by_confidence_needs_classes():
    x, net = torch.randn(5, 2), bl.BayesLinear(2, 1)
    regression = bl.evaluate(net, (x, torch.zeros(5, 1)), likelihood=bl.Gaussian(1.0), method="mean")
    with pytest.raises(ValueError, match="evaluation must be of classes to have a confidence, got a gaussian one"):
        plots.accuracy_by_confidence(regression)


def test_panels_without_labels_have_no_column_for_them():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 6, 8, generator=generator)
    prediction = bl.predict(bl.BayesConv2d(3, 4, 1), images, 4, generator=generator)
    figure = plots.segmentation_panels(images, None, prediction, class_names=list("abcd"))
    titles = [axis.get_title() for axis in figure.axes[:4]]
    assert titles == ["image", "prediction", "entropy", "mutual information"]
    assert figure.axes[2].images[0].get_clim() == (0, pytest.approx(math.log(4)))
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown == {"abcd"[k] for k in prediction.labels.unique().tolist()}
    with pytest.raises(ValueError, match="targets and prediction must be classes of shape"):
        plots.segmentation_panels(images[:1], None, prediction)
