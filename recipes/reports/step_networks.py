"""Small networks of other libraries whose steps `benchmark step` measures, with a batch each; they are Bayesian."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bayeslayers as bl
from recipes.data import clauses
from recipes.reports.text_tasks import TEXT_TASKS

Batch = tuple[nn.Module, Tensor, Tensor]


def _sentences(name: str, count: int) -> Batch:
    points = clauses.sentences(count, 0)
    return bl.to_bayesian(TEXT_TASKS[name].build())[0], points.x, points.labels


def _swin(count: int) -> Batch:
    from torchvision.models import SwinTransformer

    options: dict[str, Any] = {"stochastic_depth_prob": 0.0, "num_classes": 10}
    net = SwinTransformer([2, 2], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], **options)
    return bl.to_bayesian(net)[0], torch.rand(count, 3, 32, 32), torch.randint(10, (count,))


NETWORKS: dict[str, Callable[[int], Batch]] = {
    **{name: partial(_sentences, name) for name in TEXT_TASKS},
    "swin": _swin,
}
