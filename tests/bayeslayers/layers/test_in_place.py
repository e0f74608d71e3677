"""In-place ops on what a layer returns: they compute what they would on a copy, under every method."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayeslayers as bl

pytestmark = pytest.mark.usefixtures("one_thread")

N = 4


class OwnForward(nn.Linear):
    """A subclass whose own forward is rerouted."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


LAYERS = {
    "linear": (nn.Linear(3, 5), (N, 3)),
    "linear without bias": (nn.Linear(3, 5, bias=False), (N, 2, 3)),
    "linear in three dimensions": (nn.Linear(3, 5), (N, 2, 3)),
    "linear in five dimensions": (nn.Linear(3, 5), (N, 2, 6, 1, 3)),
    "linear of strided input": (nn.Linear(3, 5), (N, 3, 2)),
    "own forward": (OwnForward(3, 5), (N, 7, 3)),
    "conv1d": (nn.Conv1d(3, 5, 2), (N, 3, 4)),
    "conv2d": (nn.Conv2d(3, 5, 2), (N, 3, 4, 4)),
    "conv2d of groups": (nn.Conv2d(4, 4, 2, groups=2, bias=False), (N, 4, 4, 4)),
    "conv3d": (nn.Conv3d(3, 5, 2), (N, 3, 4, 4, 4)),
    "transposed conv1d": (nn.ConvTranspose1d(3, 5, 2), (N, 3, 4)),
    "transposed conv2d": (nn.ConvTranspose2d(3, 5, 2), (N, 3, 4, 4)),
    "batch norm": (nn.BatchNorm2d(3), (N, 3, 4, 4)),
    "batch norm of two dimensions": (nn.BatchNorm1d(3), (N, 3)),
    "group norm": (nn.GroupNorm(1, 3), (N, 3, 4, 4)),
    "layer norm": (nn.LayerNorm(3), (N, 4, 3)),
    "embedding": (nn.Embedding(7, 5), (N, 6)),
    "embedding of a padding row": (nn.Embedding(7, 5, padding_idx=0), (N, 6)),
    "embedding of an id an example": (nn.Embedding(7, 5), (N,)),
}
SINGLE = {
    "single linear": (nn.Linear(3, 5), (3,)),
    "single conv1d": (nn.Conv1d(3, 5, 2), (3, 4)),
    "single conv2d": (nn.Conv2d(3, 5, 2), (3, 4, 4)),
    "single layer norm": (nn.LayerNorm(3), (3,)),
    "single embedding": (nn.Embedding(7, 5), ()),
}
OPS = {
    "add_": lambda x: x.add_(x.detach().cos()),
    "relu_": torch.relu_,
    "mul_": lambda x: x.mul_(2.0),
}


class Net(nn.Module):
    def __init__(self, layer, op, in_place):
        super().__init__()
        self.layer, self.op, self.in_place = copy.deepcopy(layer), op, in_place

    def forward(self, x):
        if isinstance(self.layer, OwnForward) or (isinstance(self.layer, nn.Linear) and x.shape[-1] != 3):
            x = x.movedim(1, -1) if x.shape[-1] != 3 else x
        y = self.layer(x)
        return self.op(y if self.in_place else y.clone())


def trained(method, layer, shape, op, in_place):
    torch.manual_seed(0)
    net = bl.to_bayesian(Net(layer, op, in_place))[0]
    x = torch.randint(7, shape) if isinstance(layer, nn.Embedding) else torch.randn(shape)
    optimizer = getattr(bl, method)(net, 10, generator=torch.Generator().manual_seed(1))

    def closure():
        optimizer.zero_grad()
        output = net(x)
        loss = output.square().sum() / max(len(x) if shape else 1, 1)
        loss.backward()
        return loss

    if method in ("KFAC", "NoisyKFAC"):
        optimizer.fisher = "empirical"
    optimizer.step(closure)
    return net.state_dict()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("method", ["VOGN", "NoisyKFAC"])
@pytest.mark.parametrize("kind", [*LAYERS, *SINGLE])
def test_an_in_place_op_behind_a_layer_is_that_on_a_copy(kind, method, op):
    layer, shape = {**LAYERS, **SINGLE}[kind]
    assert_close(
        trained(method, layer, shape, OPS[op], in_place=True), trained(method, layer, shape, OPS[op], in_place=False)
    )
