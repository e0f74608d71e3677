"""The cost of a prediction beside as many forward passes of the deterministic network, and beside other libraries."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one
from recipes.reports.benchmark import interleaved_medians, peak_memory

METHODS: Mapping[str, dict[str, Any]] = {
    "default": {},
    "sample": {"method": "sample"},
    "sample, antithetic": {"method": "sample", "antithetic": True},
}
MODELS = ("mlp", "lenet5", "resnet20")
_SMALLER = {"unet_small": (3, 96, 128)}  # than the card's size, where one batch of 64 takes minutes


@dataclass(frozen=True)
class PredictRow:
    """One measurement: a prediction, and the ratio of its median time per draw to that of a deterministic forward.

    A peer that is not installed has a row with its name alone.
    """

    model: str
    batch: int
    num_samples: int
    method: str
    median_ms: float | None = None
    forward_ms: float | None = None
    ratio_per_sample: float | None = None
    peak_memory_mb: float | None = None


def benchmark_predict(
    rounds: int = 100,
    seed: int = 0,
    models: Sequence[str] = MODELS,
    batches: Sequence[int] = (1, 64, 512),
    num_samples: int = 32,
    cpu: bool = False,
    peers: bool = False,
) -> list[PredictRow]:
    """Time `predict` beside as many forward passes of the deterministic network in eval mode.

    Args:
        rounds: 20 times the runs of each, once at least, which take turns, after a tenth as many to warm up.
        seed: Of weights and data.
        models: Names of the zoo. Images of "unet_small" are 96 x 128 pixels.
        batches: Examples per batch.
        num_samples: Draws.
        cpu: Measure the time of the process in place of that of the clock, which other processes do not disturb.
        peers: Measure the installed ones of `PEERS` too, each in a loop of forward passes.
    """
    at_least_one("rounds", rounds)
    rows = []
    for name in models:
        torch.manual_seed(seed)
        model = zoo.create(name).eval()
        plain, size = bl.to_deterministic(model).eval(), _SMALLER.get(name, zoo.card_of(model).input_size)
        others = {peer: _peer(peer, plain) if peers else None for peer in PEERS} if peers else {}
        for batch in batches:
            x = torch.rand(batch, *size)
            actions: dict[str, Callable[[], object]] = {
                method: partial(bl.predict, model, x, num_samples, **options) for method, options in METHODS.items()
            }
            actions |= {peer: partial(_average, net, x, num_samples) for peer, net in others.items() if net is not None}
            medians = interleaved_medians(
                {"forward": partial(_forwards, plain, x, num_samples)} | actions,
                max(1, rounds // 20),
                time.process_time if cpu else time.perf_counter,
            )
            forward = medians["forward"] / num_samples
            for method, action in actions.items():
                ratio, peak = medians[method] / (num_samples * forward), peak_memory(action) / 2**20
                times = (round(1e3 * medians[method], 3), round(1e3 * forward, 3))
                rows.append(PredictRow(name, batch, num_samples, method, *times, round(ratio, 3), round(peak, 1)))
            rows += [
                PredictRow(name, batch, num_samples, f"{peer} (not installed)")
                for peer, net in others.items()
                if net is None
            ]
    return rows


@torch.no_grad()
def _forwards(net: nn.Module, x: Tensor, passes: int) -> None:
    for _ in range(passes):
        net(x)


@torch.no_grad()
def _average(net: nn.Module, x: Tensor, num_samples: int) -> Tensor:
    """Return the mean of the probabilities over forward passes, each of which samples."""
    return torch.stack([net(x).softmax(1) for _ in range(num_samples)]).mean(0)


def _peer(name: str, plain: nn.Module) -> nn.Module | None:
    """Return a network of another library with the architecture of a deterministic one; None if it is not installed."""
    package, make = PEERS[name]
    return make(copy.deepcopy(plain)) if importlib.util.find_spec(package) is not None else None


def _bayesian_torch(net: nn.Module) -> nn.Module:
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn  # pyright: ignore[reportMissingImports]

    prior = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
    options = {"type": "Reparameterization", "moped_enable": False, "moped_delta": 0.5}
    dnn_to_bnn(net, prior | options)
    for module in net.modules():
        if hasattr(module, "dnn_to_bnn_flag"):
            module.__dict__["dnn_to_bnn_flag"] = True  # returns the output without a divergence
    return net.eval()


def _torchbnn(net: nn.Module) -> nn.Module:
    import torchbnn  # pyright: ignore[reportMissingImports]

    return _replaced(net, partial(torchbnn.BayesLinear, 0.0, 0.1), partial(torchbnn.BayesConv2d, 0.0, 0.1))


def _blitz(net: nn.Module) -> nn.Module:
    from blitz import modules  # pyright: ignore[reportMissingImports]

    return _replaced(net, modules.BayesianLinear, modules.BayesianConv2d)


def _torch_uncertainty(net: nn.Module) -> nn.Module:
    from torch_uncertainty.layers import bayesian  # pyright: ignore[reportMissingImports]

    return _replaced(net, bayesian.BayesLinear, bayesian.BayesConv2d)


def _replaced(net: nn.Module, linear: Callable[..., nn.Module], convolution: Callable[..., nn.Module]) -> nn.Module:
    """Return the network with new layers, made with the arguments of torch's, for its linear ones and convolutions."""
    for module in list(net.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, key, linear(child.in_features, child.out_features, bias=child.bias is not None))
            elif isinstance(child, nn.Conv2d):
                sizes = child.in_channels, child.out_channels, child.kernel_size
                options: dict[str, Any] = {"stride": child.stride, "padding": child.padding}
                setattr(module, key, convolution(*sizes, **options, bias=child.bias is not None))
    return net.eval()


PEERS: Mapping[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "bayesian-torch": ("bayesian_torch", _bayesian_torch),
    "torchbnn": ("torchbnn", _torchbnn),
    "blitz": ("blitz", _blitz),
    "torch-uncertainty": ("torch_uncertainty", _torch_uncertainty),
}
