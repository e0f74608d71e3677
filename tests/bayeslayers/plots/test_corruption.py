from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import bayeslayers as bl
from bayeslayers import plots


def an_evaluation(level=0.0, kinds=("fog", "snow", "frost")):
    severities = torch.arange(1.0, 6.0, dtype=torch.float64)
    values = severities * torch.arange(1.0, len(kinds) + 1, dtype=torch.float64)[:, None] / 40 + level
    metrics = {"accuracy": 1 - values, "nll": 2 * values, "ece": values / 2}
    clean = {"accuracy": 0.99, "nll": 0.05, "ece": 0.01}
    return bl.Evaluation("categorical", 10, 2, {}, corruptions=bl.CorruptionMetrics(kinds, clean, metrics))


def test_boxes_hold_the_quartiles_and_extremes_of_the_kinds(tmp_path):
    both = {"posterior": an_evaluation(), "baseline": an_evaluation(0.05)}
    figure = plots.corruption_boxes(both, tmp_path / "boxes.png")
    assert (tmp_path / "boxes.png").stat().st_size > 1000
    assert [axis.get_ylabel() for axis in figure.axes] == ["accuracy", "NLL (nats)", "ECE"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(both)
    assert "3 kinds of corruption" in figure.get_suptitle()
    for axis, metric in zip(figure.axes, ("accuracy", "nll", "ece"), strict=True):
        assert len(axis.patches) == 10 and axis.get_xlabel() == "severity"
        for place, evaluation in enumerate(both.values()):
            values = evaluation.corruptions.values[metric].numpy()
            for severity in range(5):
                heights = axis.patches[5 * place + severity].get_path().vertices[:, 1]
                quartiles = np.quantile(values[:, severity], [0.25, 0.75])
                assert_allclose([heights.min(), heights.max()], quartiles, rtol=1e-9)
            means = [line.get_ydata() for line in axis.lines if len(line.get_ydata()) == 6][place]
            assert_allclose(means, [evaluation.corruptions.clean[metric], *values.mean(0)], rtol=1e-9)
        ends = np.concatenate([line.get_ydata() for line in axis.lines])
        everything = np.stack([evaluation.corruptions.values[metric] for evaluation in both.values()])
        assert ends.min() == pytest.approx(min(everything.min(), both["posterior"].corruptions.clean[metric]))
        assert ends.max() == pytest.approx(max(everything.max(), both["posterior"].corruptions.clean[metric]))


def test_one_evaluation_needs_no_legend_and_one_kind_has_a_box():
    figure = plots.corruption_boxes(an_evaluation(kinds=("fog",)))
    assert not figure.legends and "1 kind of corruption" in figure.get_suptitle()


def test_what_cannot_be_drawn_is_said():
    plain = bl.Evaluation("categorical", 10, 2, {})
    with pytest.raises(ValueError, match=r"evaluation 'b' must have corruptions, got none\. Call evaluate"):
        plots.corruption_boxes({"a": an_evaluation(), "b": plain})
    for count in (0, 9):
        with pytest.raises(ValueError, match=f"evaluations must hold 1 to 8, got {count}"):
            plots.corruption_boxes({str(k): an_evaluation() for k in range(count)})
