"""Prediction by averaging over posterior samples, or without sampling."""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bayeslayers.batches import input_batches, with_progress
from bayeslayers.checks import at_least_one, did_you_mean, positive
from bayeslayers.inputs import Batch, as_batch, check_inputs, is_batch, on_tensors, split
from bayeslayers.likelihoods import Gaussian, Likelihood, likelihood_of
from bayeslayers.method import DEFAULT_METHOD, method_of
from bayeslayers.outputs import Output, TensorNetwork, check_output
from bayeslayers.prediction.automatic import automatic_draws
from bayeslayers.prediction.average import Average
from bayeslayers.prediction.chunks import Plan, Run
from bayeslayers.prediction.draws import linearised_draws, local_draws, means, weight_draws
from bayeslayers.prediction.dropout import dropout_draws
from bayeslayers.prediction.moments import moment_points
from bayeslayers.prediction.output_draws import NotOncePerExampleError
from bayeslayers.prediction.result import Prediction, joined
from bayeslayers.readings import Readings
from bayeslayers.sampling import evaluation_mode, posterior
from bayeslayers.sampling.placement import at_means
from bayeslayers.sampling.sharing import in_use
from bayeslayers.unwrap import compiled_or_unwrapped, holds_compiled, unwrapped

_CHECKPOINT = 16  # samples between two checks of the standard error: fewer do not estimate it

Method: TypeAlias = Literal["auto", "sample", "mean", "local", "moments", "linearised", "dropout"]

Draws: TypeAlias = Callable[[nn.Module, Plan], Iterator[Run]]

METHODS: dict[str, Draws] = {
    "sample": weight_draws,
    "mean": means,
    "local": local_draws,
    "moments": moment_points,
    "linearised": linearised_draws,
    "dropout": dropout_draws,
}
_WITHOUT_DRAWS = ("mean", "moments")
_OF_ANY_NETWORK = ("mean", "dropout")  # need no posterior
_COMPILED = ("auto", "sample", "mean")  # call the network as a whole; the others need its modules
_OF_MODULES = ("moments", "dropout")  # read or copy the modules, and call the network themselves


def predict(
    model: nn.Module,
    x: Batch | Mapping[str, Any] | Iterable[Any],
    num_samples: int = 64,
    *,
    tolerance: float | None = None,
    sample_chunk: int | Literal["auto"] = "auto",
    batch_size: int | None = None,
    method: Method | None = None,
    antithetic: bool = False,
    likelihood: Likelihood | None = None,
    output: Output | None = None,
    generator: torch.Generator | None = None,
    result_device: torch.device | str | None = None,
    progress: bool | None = None,
    target: Tensor | None = None,
) -> Prediction:
    """Return the posterior predictive distribution for some examples, with its uncertainty decomposed.

    Samples are averaged as they come: memory does not grow with `num_samples`. The model runs in eval mode, and
    every module's mode is restored. The same arguments and generator state give the same numbers.

    Args:
        model: Model with Bayesian layers; for "mean" and "dropout" any network. For `DataParallel`,
            `DistributedDataParallel` and `AveragedModel` the network inside is called.
        x: Inputs, examples in dimension 0: a tensor, `Inputs` of several, or a mapping of keyword arguments,
            as tokenizers return it, whose "labels" are left out. Or a DataLoader or another iterable of such
            batches, each x or (x, ...); in (x, ...), a tuple x holds positional arguments. They are moved to the
            model's device. All batches see the same samples.
        num_samples: Posterior samples, >= 1; with a tolerance, their maximum.
        tolerance: Standard error of the mean, > 0, below which a batch needs no more samples. It applies to
            every probability, or to every real mean. The error is checked every 16 samples, and a warning
            says if `num_samples` did not reach the tolerance. The check can stop too early: it does not see a
            rare event that no sample has shown yet.
        sample_chunk: Samples to run at once. "auto" takes as many as keep the largest layer output in the
            cache, at most 32. The results agree to rounding. If memory does not suffice, the number is
            halved, with a warning.
        batch_size: Examples per forward pass; None takes a tensor whole, and batches as they come.
        method: How to average over the posterior. None takes the method that the model's card names, if it is not
            "sample", as "linearised" after `laplace`; else "auto", or "sample" with a `generator`, whose numbers
            are then those of `evaluate` too.
            "auto" samples whole networks, but in one batch x the outputs of a linear layer where that costs less
            and is exact for each example, see `bayeslayers.prediction.automatic`. With several batches, `batch_size`,
            `tolerance`, `antithetic` or a compiled network it is "sample".
            "sample" samples whole networks.
            "mean" runs once with the posterior means; epistemic uncertainty is then 0.
            "moments" propagates mean and variance in one pass, see `bayeslayers.prediction.moments`; the outputs'
            Gaussian is then averaged over `num_samples` fixed points.
            "local" samples the outputs of linear layers and convolutions example by example. It is exact for
            layers on `(n, i)`, an approximation where positions share weights, and faster where
            weights outnumber activations, see `bayeslayers.layers.perturbation`.
            "linearised" samples outputs of the network linearised in its weights (Immer et al. 2021).
            "dropout" samples dropout masks at the posterior means, the baseline of Gal & Ghahramani 2016; see
            `bayeslayers.prediction.dropout`.
        antithetic: Sample in pairs, mean + noise and mean - noise, with an even `num_samples`, for method
            "sample". Functions that are linear in the weights then have no Monte-Carlo error; the standard
            error is that of pairs.
        likelihood: Meaning of the outputs; None takes `model.likelihood`, else `Categorical()`.
        output: What is predicted where the model returns more than one tensor: a key or an attribute
            ("logits"), an index, or a function of what it returns. None takes a tensor as it is, and "logits" of a
            mapping that has them, as the models of transformers do.
        generator: Source of the samples, on the model's device; torch's default one if None.
        result_device: Device to which the results of each batch are moved, such as "cpu"; None leaves
            them on the model's device.
        progress: Show a progress bar; None shows it for a DataLoader on a terminal.
        target: Real targets of the examples of a tensor `x`, for `log_prob` of the prediction: their log density under
            the mixture of all samples, which mean and variance alone do not determine.

    Raises:
        ValueError: If inputs are empty or not finite, a number is out of its range, the method is
            unknown or does not fit the model or the other arguments, or no layer is Bayesian.
        TypeError: If `x` yields no tensors, or the output is anything but one tensor.
        FloatingPointError: If the prediction is not finite; it is a ValueError too.

    Example:
        >>> import torch, bayeslayers as bl
        >>> prediction = bl.predict(bl.BayesLinear(4, 3), torch.randn(5, 4), num_samples=8)
        >>> prediction.probs.shape, prediction.labels.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """
    name = _default(model, generator) if method is None else method
    device = _device(unwrapped(model), name)
    whole = as_batch(x) if is_batch(x) else None
    if generator is None and whole is None:
        generator = _seeded(device)
    check_output(output)
    plan = _plan(num_samples, tolerance, sample_chunk, name, antithetic, generator, output)
    if batch_size is not None:
        at_least_one("batch_size", batch_size)
    if name == "auto" and _needs_networks(model, whole, plan, batch_size):
        name = "sample"
    likelihood = likelihood or likelihood_of(model)
    _check_target(target, whole, likelihood)
    model = compiled_or_unwrapped(model) if name in _COMPILED else unwrapped(model)
    network = model if name in _OF_MODULES else TensorNetwork(model, output)
    number = itertools.count()

    def result(inputs: Batch) -> Prediction:
        check_inputs(inputs)
        size = batch_size or len(inputs)
        batches = split(on_tensors(lambda part: part.to(device), inputs), size)
        targets = [None] * len(batches) if target is None else target.to(device).split(size)

        def filled(method: Draws) -> list[Average]:
            averages = [Average(likelihood, 2 if antithetic else 1, part) for part in targets]
            _fill(averages, network, batches, plan, method, tolerance)
            return averages

        try:
            averages = filled(METHODS[name] if name != "auto" else partial(automatic_draws, batch=batches[0]))
        except NotOncePerExampleError:  # under "auto", what a forward calls depends on the sample
            averages = filled(weight_draws)
        readings = Readings()
        found = [average.result(readings, next(number)) for average in averages]
        for _, check in found:
            check()
        part = joined([prediction for prediction, _ in found])
        return part if result_device is None else part.to(result_device)

    with torch.no_grad(), in_use(model, trains=False), evaluation_mode(model), at_means(model):
        found = joined([result(batch) for batch in ((whole,) if whole is not None else _stream(x, plan, progress))])
    if name == "moments":
        found = replace(found, standard_error=torch.full_like(found.standard_error, math.nan))
    if tolerance is not None and not (missed := float(found.standard_error.max())) < tolerance:
        warnings.warn(
            f"tolerance {tolerance} is not reached by {num_samples} samples: the largest standard error is "
            f"{missed:.2g}. Raise num_samples.",
            stacklevel=2,
        )
    return found


def _plan(
    num_samples: int,
    tolerance: float | None,
    sample_chunk: int | str,
    method: str,
    antithetic: bool,
    generator: torch.Generator | None,
    output: Output | None,
) -> Plan:
    at_least_one("num_samples", num_samples)
    if method not in (names := ("auto", *METHODS)):
        raise ValueError(
            f"method must be one of {', '.join(map(repr, names))}, got {method!r}.{did_you_mean(str(method), names)}"
        )
    if sample_chunk != "auto":
        at_least_one("sample_chunk", sample_chunk)  # pyright: ignore[reportArgumentType]
    if tolerance is not None:
        positive("tolerance", tolerance)
        if method in _WITHOUT_DRAWS:
            raise ValueError(f"tolerance must be None for method {method!r}, which does not sample, got {tolerance}.")
    if antithetic and method not in ("auto", "sample"):
        raise ValueError(
            f"antithetic must be False for method {method!r}, got True: only weights come in pairs. "
            "Give method='sample'."
        )
    if antithetic and num_samples % 2:
        raise ValueError(f"num_samples must be even for antithetic pairs, got {num_samples}.")
    chunk = None if sample_chunk == "auto" else int(sample_chunk)
    return Plan(int(num_samples), chunk, generator, antithetic, None if tolerance is None else _CHECKPOINT, output)


def _default(model: nn.Module, generator: torch.Generator | None) -> str:
    """Return the card's method; where that is just sampling, "auto" unless a generator asks for the same numbers."""
    method = method_of(model)
    return "auto" if method == DEFAULT_METHOD and generator is None else method


def _needs_networks(model: nn.Module, whole: Batch | None, plan: Plan, batch_size: int | None) -> bool:
    """Return whether "auto" has to sample whole networks: one for several batches, in pairs, until they suffice."""
    several = whole is None or (batch_size is not None and batch_size < len(whole))
    return several or plan.antithetic or plan.checkpoint is not None or holds_compiled(model)


def _device(model: nn.Module, method: str) -> torch.device:
    sites = list(posterior(model))
    if not sites and method not in _OF_ANY_NETWORK:
        raise ValueError(
            "model must have Bayesian layers, got none: every sample would be the same. method='mean' predicts with "
            "the weights as they are; bl.to_bayesian converts a network."
        )
    return sites[0].mean.device if sites else next((p.device for p in model.parameters()), torch.device("cpu"))


def _seeded(device: torch.device) -> torch.Generator:
    """Return a generator that is seeded from the default one."""
    return torch.Generator(device).manual_seed(int(torch.empty((), dtype=torch.int64).random_()))


def _stream(x: Any, plan: Plan, progress: bool | None) -> Iterator[Batch]:
    """Yield the inputs of each batch; the generator is reset for each, so that all batches see the same samples."""
    if hasattr(x, "__array__"):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}. torch.as_tensor converts arrays.")
    assert plan.generator is not None
    batches, state = input_batches("x", x), plan.generator.get_state()
    if progress or (progress is None and isinstance(x, DataLoader) and sys.stderr is not None and sys.stderr.isatty()):
        batches = with_progress("predict", batches, len(x) if isinstance(x, Sized) else None)
    for batch in batches:
        plan.generator.set_state(state)
        yield batch


def _fill(
    averages: Sequence[Average],
    model: nn.Module,
    batches: Sequence[Batch],
    plan: Plan,
    method: Draws,
    tolerance: float | None,
) -> None:
    """Fill each batch's average over samples; each sample goes to all batches that need more."""
    unfinished = list(zip(averages, batches, strict=True))
    for run in method(model, plan):
        for average, batch in unfinished:
            for outputs in run(batch):
                average.add(outputs)
        if tolerance is not None:
            unfinished = [(a, b) for a, b in unfinished if a.draws % _CHECKPOINT or not a.error().max() < tolerance]
            if not unfinished:
                break


def _check_target(target: Tensor | None, x: Batch | None, likelihood: Likelihood) -> None:
    if target is None:
        return
    if not isinstance(likelihood, Gaussian) or x is None:
        raise ValueError(
            "target must be None but for one batch x and a Gaussian likelihood, got one for "
            f"{'an iterable of batches' if x is None else f'a {likelihood.name} likelihood'}. Probabilities of classes "
            "are in `probs`; bl.evaluate takes loaders."
        )
    if len(target) != len(x):
        raise ValueError(f"target must have a row for each of the {len(x)} examples, got {len(target)}.")
