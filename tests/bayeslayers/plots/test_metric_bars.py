from __future__ import annotations

import math

import pytest

from bayeslayers.plots.metric_bars import has_bars, metric_bars


def test_bars_have_the_heights_of_the_metrics_and_start_at_zero(tmp_path):
    metrics = {"nll": -0.5, "accuracy": 0.9, "seed": 0, "ece": math.inf}
    figure = metric_bars(metrics, {"optimizer": "adam", "accuracy": 0.8}, tmp_path / "bars.png")
    accuracy, nll = figure.axes
    assert [bar.get_height() for bar in accuracy.patches] == [0.9, 0.8]
    assert [bar.get_height() for bar in nll.patches] == [-0.5] and nll.patches[0].get_y() == 0
    assert [text.get_text() for text in accuracy.get_xticklabels()] == ["posterior", "adam"]
    assert accuracy.get_title() == "accuracy ↑" and accuracy.get_ylim()[0] <= 0
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("metrics", [{}, {"seed": 0}, {"ece": math.nan}, {"accuracy": "high"}])
def test_without_a_usual_metric_there_is_nothing_to_draw(metrics):
    assert not has_bars(metrics) and has_bars({"ece": 0.1})
    with pytest.raises(ValueError, match="metrics must hold one of accuracy, miou"):
        metric_bars(metrics, {})
