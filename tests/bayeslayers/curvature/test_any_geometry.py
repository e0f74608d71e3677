"""Layers of random geometry, batch size, memory format and frozen parameters beside per-example autograd in float64.

BAYESLAYERS_FUZZ sets how many are tried.
"""

from __future__ import annotations

import os

import hypothesis
import torch
from hypothesis import strategies as st
from support.per_example import EXACT, bayesian, potential, squares_by_autograd, tracked_squares
from torch import nn
from torch.testing import assert_close

import bayeslayers as bl

SETTINGS = hypothesis.settings(
    deadline=None, max_examples=int(os.environ.get("BAYESLAYERS_FUZZ", "40")), derandomize=True
)
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@st.composite
def convolutions(draw):
    """A convolution or its transpose, of one to three dimensions, and the sizes of an image that it takes."""
    dims = draw(st.integers(1, 3))
    groups, transposed = draw(st.integers(1, 3)), draw(st.booleans())
    kernel = draw(st.tuples(*[st.integers(1, 4 if dims < 3 else 2)] * dims))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * dims))
    padding = draw(st.tuples(*[st.integers(0, 2)] * dims))
    stride = draw(st.tuples(*[st.integers(1, 3)] * dims))
    mode = "zeros" if transposed else draw(st.sampled_from(["zeros", "circular", "replicate"]))
    least = [max(1, d * (k - 1) + 1 - 2 * p, p) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    if transposed:  # whose output must have a pixel
        least = [
            max(1, (2 * p - d * (k - 1) + s - 1) // s + 1)
            for k, d, p, s in zip(kernel, dilation, padding, stride, strict=True)
        ]
    sizes = [draw(st.integers(low, low + 3)) for low in least]
    channels = groups * draw(st.integers(1, 3))
    layer = (TRANSPOSED if transposed else CONVOLUTIONS)[dims](
        channels,
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
    )
    return layer, [channels, *sizes]


@st.composite
def dense_layers(draw):
    """A linear layer or a normalisation, and the sizes of an input behind the batch."""
    features, bias = draw(st.integers(1, 6)), draw(st.booleans())
    middle = draw(st.lists(st.integers(1, 4), max_size=2))
    kind = draw(st.sampled_from(["linear", "layer", "group", "batch"]))
    if kind == "linear":
        return nn.Linear(features, draw(st.integers(1, 5)), bias), [*middle, features]
    if kind == "layer":
        return nn.LayerNorm(features, bias=bias), [*middle, features]
    if kind == "group":
        groups = draw(st.integers(1, 3))
        return nn.GroupNorm(groups, groups * features), [groups * features, *middle, 2]  # torch refuses one value
    return nn.BatchNorm1d(features), [features, *middle[:1]]


@SETTINGS
@hypothesis.given(st.one_of(convolutions(), dense_layers()), st.integers(1, 5), st.booleans(), st.data())
def test_squared_gradients_of_any_geometry_are_those_of_autograd(case, examples, channels_last, data):
    layer, sizes = case
    net = bayesian(layer).eval()  # batch normalisation by its running moments: an example alone has no others
    parameters = list(net.parameters())
    for parameter in parameters[: data.draw(st.integers(0, len(parameters) - 1), "frozen")]:
        parameter.requires_grad_(False)
    x = torch.randn(examples, *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(examples))
    if channels_last and x.dim() - 2 in FORMATS:
        x = x.to(memory_format=FORMATS[x.dim() - 2])

    def loss(net, x):
        return potential(net(x))

    expected = squares_by_autograd(net, loss, x)
    squares = tracked_squares(net, loss, x)
    assert set(squares) == set(expected)
    for name in expected:
        assert_close(squares[name], expected[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}")


@SETTINGS
@hypothesis.given(
    st.one_of(convolutions(), dense_layers()),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.integers(2, 4),
    st.sampled_from(["vogn", "ivon"]),
)
def test_a_step_keeps_dtypes_and_positive_precisions(case, dtype, examples, name):
    layer, sizes = case
    torch.manual_seed(0)
    net = bl.to_bayesian(layer.to(dtype))[0]
    if dtype == torch.float16 and not _runs(net, sizes):
        return  # torch has no such kernel on this device
    optimizer = {"vogn": bl.VOGN, "ivon": bl.IVON}[name](net, dataset_size=100, lr=1e-3)
    x = torch.randn(examples, *sizes).to(dtype)

    def closure():
        optimizer.zero_grad()
        loss = net(x).float().square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).isfinite()
    for key, parameter in net.named_parameters():
        assert parameter.dtype == dtype and parameter.isfinite().all(), key
    for key, value in net.state_dict().items():
        if key.endswith("_precision"):
            assert (value > 0).all() and value.isfinite().all(), key


def _runs(net: nn.Module, sizes: list[int]) -> bool:
    try:
        net(torch.randn(2, *sizes).half()).float().sum().backward()
    except RuntimeError as error:
        assert "not implemented for 'Half'" in str(error)
        return False
    net.zero_grad()
    return True
