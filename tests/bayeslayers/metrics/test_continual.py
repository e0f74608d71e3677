from __future__ import annotations

import math

import pytest
import torch

from bayeslayers.metrics.continual import average_accuracy, backward_transfer

MATRIX = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.7, 0.3], [0.6, 0.75, 0.5]], dtype=torch.float64)


def test_average_and_backward_transfer_of_three_tasks():
    assert average_accuracy(MATRIX) == pytest.approx((0.6 + 0.75 + 0.5) / 3)
    assert backward_transfer(MATRIX) == pytest.approx(((0.6 - 0.9) + (0.75 - 0.7)) / 2)


def test_entries_of_tasks_not_yet_learned_do_not_count():
    unseen = torch.where(torch.ones_like(MATRIX).triu(1).bool(), math.nan, MATRIX)
    assert average_accuracy(unseen) == average_accuracy(MATRIX)
    assert backward_transfer(unseen) == backward_transfer(MATRIX)


def test_one_task_has_no_transfer():
    assert math.isnan(backward_transfer(MATRIX[:1, :1]))


@pytest.mark.parametrize("metric", [average_accuracy, backward_transfer])
def test_a_matrix_must_be_square(metric):
    with pytest.raises(ValueError, match=r"a row and a column for each task, got the shape \(2, 3\)"):
        metric(MATRIX[:2])
