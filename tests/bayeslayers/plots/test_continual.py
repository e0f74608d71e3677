from __future__ import annotations

import math

import pytest
import torch

from bayeslayers import plots


def curves(epochs, tasks, level):
    values = torch.full((epochs, tasks), level, dtype=torch.float64)
    for task in range(tasks):
        values[: epochs * task // tasks, task] = math.nan
    return values


def test_forgetting_curves_have_a_panel_for_each_task_and_a_line_for_each_method(tmp_path):
    figure = plots.forgetting_curves({"VOGN": curves(6, 3, 0.9), "Adam": curves(12, 3, 0.5)}, tmp_path / "curves.png")
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == ["task 1", "task 2", "task 3"]
    vogn, adam, begin = panels[1].lines
    assert vogn.get_xdata().tolist() == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]  # in tasks, whatever the epochs
    assert len(adam.get_xdata()) == 12 and adam.get_xdata()[-1] == 3.0
    assert math.isnan(vogn.get_ydata()[1]) and vogn.get_ydata()[2] == pytest.approx(90.0)
    assert begin.get_xdata()[0] == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["VOGN", "Adam"]
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_eleven_tasks_leave_no_empty_panel():
    figure = plots.forgetting_curves({"VOGN": curves(11, 11, 0.9)})
    assert sum(axis.get_visible() for axis in figure.axes) == 11


@pytest.mark.parametrize("given", [{}, {"a": torch.zeros(2, 3), "b": torch.zeros(2, 4)}])
def test_curves_must_have_one_number_of_tasks(given):
    with pytest.raises(ValueError, match=r"curves must have the shape \(epochs, tasks\)"):
        plots.forgetting_curves(given)


def test_an_accuracy_matrix_shows_the_tasks_learned_so_far(tmp_path):
    matrix = torch.tensor([[0.9, 0.1], [0.75, 0.8]])
    figure = plots.accuracy_matrix(matrix, tmp_path / "matrix.png")
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["75.0", "80.0", "90.0"]
    assert (tmp_path / "matrix.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="a row and a column for each task"):
        plots.accuracy_matrix(matrix[:1])
