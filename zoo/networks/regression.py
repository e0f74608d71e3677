"""A perceptron for tables of real numbers, which takes inputs and gives targets in the data's own units."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn

import bayeslayers as bl
from bayeslayers.checks import at_least_one, did_you_mean, positive
from zoo.networks.mlp import ACTIVATIONS
from zoo.normalise import Normalise
from zoo.registry import register

NOISES = ("learned", "predicted", "known")


class TargetScale(nn.Module):
    """The last module of a regression: outputs of unit scale to the units of the targets.

        mean = target_mean + target_std output          log variance = log variance + 2 log target_std

    Args:
        mean: Mean of each of the k targets.
        std: Their standard deviations, > 0.
        noise: "learned" has one noise variance per target, a parameter of this module that the optimiser trains, and
            "predicted" takes it from the second half of the outputs: both give means and log variances, `(n, 2k)`, as
            `Gaussian()` takes them. "known" gives the means `(n, k)` alone, for `Gaussian(variance)`.
        noise_std: Standard deviation that learned noise starts at, in units of `std`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], noise: str = "learned", noise_std: float = 1.0):
        super().__init__()
        if noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}.{did_you_mean(noise, NOISES)}")
        positive("noise_std", noise_std)
        # Checked on the CPU: a network on the meta device has no values.
        numbers = [torch.tensor(values, dtype=torch.float32, device="cpu") for values in (mean, std)]
        if (
            len(mean) != len(std)
            or not all(values.isfinite().all() for values in numbers)
            or not (numbers[1] > 0).all()
        ):
            raise ValueError(
                "target_mean and target_std must have a finite number per target, target_std > 0, got "
                f"{list(mean)!r:.60} and {list(std)!r:.60}."
            )
        self.noise, device = noise, torch.get_default_device()
        for name, values in zip(("mean", "std"), numbers, strict=True):
            self.register_buffer(name, values.to(device))
        if noise == "learned":
            self.log_variance = nn.Parameter(torch.full((len(mean),), 2 * math.log(noise_std)))

    def forward(self, output: Tensor) -> Tensor:
        if self.noise == "known":
            return self.mean + self.std * output
        if self.noise == "predicted":
            mean, log_variance = output.chunk(2, dim=1)
        else:
            mean, log_variance = output, self.log_variance.expand_as(output)
        return torch.cat([self.mean + self.std * mean, log_variance + 2 * self.std.log()], 1)

    def extra_repr(self) -> str:
        return f"targets={len(self.mean)}, noise={self.noise!r}"


@register
def regressor(
    num_targets: int = 1,
    input_size: Sequence[int] = (1,),
    widths: Sequence[int] = (50,),
    activation: str = "relu",
    noise: str = "learned",
    noise_std: float = 0.5,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    target_mean: Sequence[float] = (0.0,),
    target_std: Sequence[float] = (1.0,),
    features: Sequence[str] = (),
) -> nn.Sequential:
    """Build a perceptron whose inputs and outputs are in the units of the data.

    Args:
        num_targets: Real numbers to predict, k.
        input_size: Shape of one example, `(features,)`.
        widths: Units of each hidden layer.
        activation: One of "relu", "tanh", "gelu", "silu".
        noise: "learned", "predicted" or "known", see `TargetScale`.
        noise_std: What learned noise starts at, in units of `target_std`. A start above the residuals makes squared
            gradients, (residual / variance)^2, far smaller than the curvature, 1 / variance: the posterior of VOGN
            grows as wide as its prior, and the noise is then learned to be large. Far below them, the first gradients
            are so large that Adam, which divides by their root mean square, moves the noise slowly ever after.
        mean: Mean of the inputs, per feature, or one for all.
        std: Standard deviation of the inputs.
        target_mean: Mean of the targets, per target, or one for all.
        target_std: Standard deviation of the targets.
        features: Names of the features, by which columns of a table are found; empty for their order alone.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
            f"{did_you_mean(activation, ACTIVATIONS)}"
        )
    for width in (*widths, num_targets):
        at_least_one("widths and num_targets", width)
    if len(features) not in (0, prod(input_size)):
        raise ValueError(f"features must name all {prod(input_size)} features or none, got {len(features)} names.")
    scales = [list(values) * (num_targets if len(values) == 1 else 1) for values in (target_mean, target_std)]
    if any(len(values) != num_targets for values in scales):
        raise ValueError(f"target_mean and target_std must have 1 or {num_targets} values.")
    modules: list[tuple[str, nn.Module]] = [("normalise", Normalise(input_size, mean, std)), ("flatten", nn.Flatten())]
    sizes = [prod(input_size), *widths]
    for index, (before, after) in enumerate(pairwise(sizes), start=1):
        modules += [(f"hidden{index}", bl.BayesLinear(before, after)), (f"act{index}", ACTIVATIONS[activation]())]
    outputs = num_targets * (2 if noise == "predicted" else 1)
    modules += [
        ("output", bl.BayesLinear(sizes[-1], outputs)),
        ("target", TargetScale(scales[0], scales[1], noise, noise_std)),
    ]
    return nn.Sequential(OrderedDict(modules))
