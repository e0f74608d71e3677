"""Diagonal Laplace approximation: a posterior for a network that is already trained, from one pass over the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from bayeslayers.batches import Labelled, labelled_batches, with_progress
from bayeslayers.checks import network, positive
from bayeslayers.convert import ConversionReport, to_bayesian, to_deterministic
from bayeslayers.convert.selection import Selectors
from bayeslayers.curvature.counts import IGNORED
from bayeslayers.curvature.elements import Elements, LossFunctions, refuse_empty
from bayeslayers.distributions.gaussian import in_double
from bayeslayers.dtypes import at_least_float32
from bayeslayers.inputs import Batch, call, on_tensors
from bayeslayers.layers import BayesianLayer
from bayeslayers.likelihoods import Likelihood, check_likelihood, likelihood_of, sampled_targets
from bayeslayers.outputs import Output, check_output, tensor_output
from bayeslayers.sampling import Site, evaluation_mode, posterior
from bayeslayers.sampling.tracker import Tracker, layers_of
from bayeslayers.storage.card import ABOUT_DATA, Card
from bayeslayers.unwrap import unwrapped

Network = TypeVar("Network", bound=nn.Module)
PriorPrecision = float | Literal["marglik", "marglik_per_layer"] | None
Fisher = Literal["empirical", "sampled"]
Labels = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LaplaceFit:
    """What a Laplace approximation found.

    Attributes:
        log_marginal_likelihood: Laplace's estimate of log p(data | prior), in nats, with the likelihood to the
            power 1/T. It compares priors, and networks, on the same data.
        log_likelihood: log p(data | means), in nats.
        dataset_size: Number of labelled examples in the pass, N.
        prior_precision: Prior precision by layer, found or given; empty where the layers kept theirs.
        report: What became Bayesian; None where the network's own Bayesian layers were used.
    """

    log_marginal_likelihood: float
    log_likelihood: float
    dataset_size: int
    prior_precision: Mapping[str, float]
    report: ConversionReport | None


def laplace(
    model: Network,
    data: Labelled,
    likelihood: Likelihood | None = None,
    prior_precision: PriorPrecision = "marglik",
    *,
    layers: Selectors | None = None,
    temperature: float = 1.0,
    progress: bool = False,
    elements_per_example: float | None = None,
    output: Output | None = None,
    prior: nn.Module | None = None,
    fisher: Fisher = "empirical",
    generator: torch.Generator | None = None,
) -> Network:
    """Return a trained network with its Laplace posterior; its attribute `laplace` is the `LaplaceFit`.

        p = (1/T) P sum_i (grad loss_i(m))^2 + p0

    for losses that are means over P elements of an example, such as the pixels of an image: each example
    counts as one observation, whatever P. Ignored labels (-100) count in neither N nor P.

    The weights m do not change. One pass over the data, in eval mode, gives the sum of squared
    per-example gradients, the diagonal of the empirical Fisher matrix, which stands in for the Hessian. The
    pass also gives the evidence, which "marglik" maximises over the prior precision:

        log p(data | p0) ~ -(1/T) sum_i loss_i(m) - 1/2 sum_w [p0 (m - m0)^2 + log(p / p0)]

    The posterior lies in the same buffers as any other, so `predict`, `evaluate` and `save_posterior`
    work. The card of the result, `net.card`, names the method "linearised", which `predict` then takes by
    default, also after saving and loading.

    Source: Ritter et al. 2018 (ICLR, "A Scalable Laplace Approximation"); MacKay 1992 ("A Practical
    Bayesian Framework"); Immer et al. 2021 (arXiv 2104.04975); Daxberger et al. 2021
    (arXiv 2106.14806).

    Args:
        model: Trained network, left unchanged. The result is a copy; an ordinary network is converted by
            `to_bayesian` first. Frozen weights get a posterior too. For a wrapper of torch (`DataParallel`,
            `AveragedModel`, `torch.compile`) the result is a copy of the network inside.
        data: Training data: a loader, another iterable of batches (x, y), or one batch; as for `evaluate`.
        likelihood: Meaning of the outputs, which becomes the result's `likelihood`; None takes
            `model.likelihood`, else `Categorical()`.
        prior_precision: Precision p0 of the prior of all weights. "marglik" finds one for all layers,
            "marglik_per_layer" one for each. None keeps the layers' own, as after `posterior_to_prior`.
            The prior means are the layers': 1 for the scale of a norm, else 0.
        layers: Layers that get a posterior, as `include` of `to_bayesian`. `last_layer` makes the rest
            deterministic, even if it was Bayesian. None takes all layers, or those that are Bayesian already.
        temperature: T of the tempered posterior; T < 1 sharpens.
        progress: Whether to show a progress bar.
        elements_per_example: Elements (pixels, labels) that `likelihood.loss` averages over for each
            example; None finds their number for this library's likelihoods and most others, see `VOGN`.
        output: Which part of what the network returns, as in `predict`.
        prior: Network whose posterior is the prior of the result, layer by layer, as that of the tasks before in
            online EWC; it stands in the place of `prior_precision`.
        fisher: "empirical" squares gradients at the labels of the data; "sampled" at labels that the network's own
            likelihood draws, whose mean is the Fisher information. Where the data is fitted well, the first are
            much smaller.
        generator: Source of the drawn labels; torch's default one if None.

    Raises:
        ValueError: If an argument breaks its rule, no prior precision maximises the evidence, or `prior` has no
            posterior for a weight.
        TypeError: If the network returns anything but one tensor.
        FloatingPointError: If a loss or a squared gradient is not finite.
        RuntimeError: If a layer has no per-example gradients, for example because it runs twice in one pass.

    Example:
        >>> import torch, bayeslayers as bl
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
        >>> net = bl.laplace(net, [(x, y)], layers=bl.last_layer)
        >>> net.laplace.dataset_size, net[2].weight_precision.shape, net.card.method
        (20, torch.Size([3, 8]), 'linearised')
    """
    network("model", model)
    positive("temperature", temperature)
    if elements_per_example is not None:
        positive("elements_per_example", elements_per_example)
    check_output(output)
    if isinstance(prior_precision, str):
        if prior_precision not in ("marglik", "marglik_per_layer"):
            raise ValueError(
                "prior_precision must be a number > 0, 'marglik', 'marglik_per_layer' or None, got "
                f"{prior_precision!r}."
            )
    elif prior_precision is not None:
        positive("prior_precision", prior_precision)
    meaning = likelihood or likelihood_of(model)
    if fisher not in ("empirical", "sampled"):
        raise ValueError(f"fisher must be 'empirical' or 'sampled', got {fisher!r}.")
    if fisher == "sampled":
        check_likelihood(meaning)
    net, report = _bayesian_copy(cast(Network, unwrapped(model)), layers)
    sites = list(posterior(net))
    if prior is not None:
        _take_prior(sites, prior)
        prior_precision = None
    batches = labelled_batches(
        "data", with_progress("laplace", data) if progress and not isinstance(data, tuple) else data
    )
    labels = partial(_sampled_labels, meaning, generator) if fisher == "sampled" else None
    squares, log_likelihood, examples = _one_pass(net, sites, batches, meaning, elements_per_example, output, labels)
    curvature = {name: square / temperature for name, square in squares.items()}
    found = _set_prior_precision(sites, curvature, prior_precision)
    with torch.no_grad():
        for site in sites:
            site.precision.copy_(curvature[site.name] + site.prior_precision)
    card = getattr(net, "card", None)
    net.__dict__["card"] = _own_card(card if isinstance(card, Card) else Card(), report, examples, temperature)
    if likelihood is not None or likelihood_of(net) != meaning:
        net.__dict__["likelihood"] = meaning
    evidence = log_likelihood / temperature - sum(_occam_factor(site, curvature[site.name]) for site in sites)
    net.__dict__["laplace"] = LaplaceFit(evidence, log_likelihood, examples, found, report)
    return net


def _bayesian_copy(model: Network, layers: Selectors | None) -> tuple[Network, ConversionReport | None]:
    """Return a copy of the network with Bayesian layers, and the report of the conversion if there was one."""
    sites = list(posterior(model))
    if sites and layers is None:
        net = copy.deepcopy(model)
        for layer in net.modules():
            if isinstance(layer, BayesianLayer):
                layer.drop_roots()
        return net, None
    net, report = to_bayesian(to_deterministic(model) if sites else model, include=layers)
    before = {site.name: site for site in sites}
    for site in posterior(net):
        if (old := before.get(site.name)) is not None:
            for part in ("prior_mean", "prior_precision"):
                setattr(site.module, f"{site.key}_{part}", getattr(old, part).clone())
    return net, report


def _take_prior(sites: Sequence[Site], prior: nn.Module) -> None:
    """Make the posterior of another network the prior of the sites of the same names."""
    found = {site.name: site for site in posterior(unwrapped(prior))}
    for site in sites:
        if (old := found.get(site.name)) is None or old.mean.shape != site.mean.shape:
            raise ValueError(
                f"prior must have a posterior for '{site.name}' of shape {tuple(site.mean.shape)}, got none. Pass the "
                "same network after an earlier task."
            )
        for part, value in (("prior_mean", old.mean), ("prior_precision", old.precision)):
            setattr(site.module, f"{site.key}_{part}", value.detach().to(site.mean.device).clone())


def _sampled_labels(likelihood: Likelihood, generator: torch.Generator | None, output: Tensor, y: Tensor) -> Tensor:
    """Return labels drawn from the output in the place of the data's, but for ignored ones."""
    drawn = sampled_targets(likelihood, at_least_float32(output), generator)
    return torch.where(y == IGNORED, y, drawn.to(y.dtype)) if not y.is_floating_point() else drawn.reshape(y.shape)


def _one_pass(
    net: nn.Module,
    sites: Sequence[Site],
    batches: Iterator[tuple[Batch, Tensor]],
    likelihood: Likelihood,
    elements_per_example: float | None,
    output: Output | None,
    labels: Labels | None,
) -> tuple[dict[str, Tensor], float, int]:
    """Return sums of squared per-example gradients by name, the log likelihood, and the number of examples.

    They belong to N times the mean over all elements of the data, so that the batch size does not matter.
    """
    uncertain = {site.mean for site in sites}
    flags = {parameter: parameter.requires_grad for parameter in net.parameters()}
    for parameter in flags:  # no gradient is computed unless it is squared
        parameter.requires_grad_(parameter in uncertain)
    squares = {site.name: torch.zeros_like(site.mean, requires_grad=False) for site in sites}
    tracker = Tracker(layers_of(net), model=net)
    total, examples, elements = 0.0, 0, 0.0
    with torch.enable_grad(), evaluation_mode(net):
        for x, y in batches:
            seen, loss = _add_squares(
                squares, net, tracker, sites, x, y, likelihood, elements_per_example, output, labels
            )
            total += loss * seen.number
            examples += seen.examples
            elements += seen.number
    for parameter, flag in flags.items():
        parameter.grad = None
        parameter.requires_grad_(flag)
    if examples == 0:
        raise ValueError("data must hold at least one labelled example, got none.")
    per_element = examples / elements
    return {name: square * per_element for name, square in squares.items()}, -total * per_element, examples


def _add_squares(
    squares: dict[str, Tensor],
    net: nn.Module,
    tracker: Tracker,
    sites: Sequence[Site],
    x: Batch,
    y: Tensor,
    likelihood: Likelihood,
    elements_per_example: float | None,
    output: Output | None,
    labels: Labels | None,
) -> tuple[Elements, float]:
    """Add the squared gradients of a batch's summed loss; return its elements and their mean loss.

    Gradients are those at `labels`, a function of outputs and targets, where it is given.
    """
    refuse_empty(len(y))
    if not (y.is_floating_point() or (y != IGNORED).any()):
        return Elements(0.0, 0), 0.0
    device = sites[0].mean.device
    with tracker.track(), LossFunctions() as losses:
        found = tensor_output(call(net, on_tensors(lambda part: part.to(device), x)), output)
        loss = likelihood.loss(found, y.to(device))
        if not loss.isfinite():
            raise FloatingPointError(f"the loss must be finite, got {loss.item()} on a batch of {len(y)} examples.")
        at_labels = loss if labels is None else likelihood.loss(found, labels(found, y.to(device)))
        at_labels.backward()
    seen = losses.elements(len(y), elements_per_example)
    for site in sites:
        squares[site.name].add_(_square(site, tracker.leaves.get(site.name)), alpha=seen.number**2)
    if tracker.examples != len(y):
        raise RuntimeError(
            f"dimension 0 of every Bayesian layer's input must run over the {len(y)} examples of the targets, "
            f"got {tracker.examples}. Choose other layers."
        )
    return seen, loss.item()


def _square(site: Site, leaf: Tensor | None) -> Tensor:
    """Return the sum of squares of one tensor, 0 where no output depends on it."""
    square = None if leaf is None else leaf.grad
    if square is None:
        if site.mean.grad is not None:
            raise RuntimeError(
                f"parameter '{site.name}' must get its gradient through its own layer, but was used without calling "
                "it. Choose other layers."
            )
        return torch.zeros_like(site.mean)
    if not square.isfinite().all():
        raise FloatingPointError(f"the squared gradients of '{site.name}' must be finite, got some that are not.")
    return square


def _set_prior_precision(
    sites: Sequence[Site], curvature: Mapping[str, Tensor], prior_precision: PriorPrecision
) -> dict[str, float]:
    """Write the prior precision to the sites, and return it by layer."""
    if prior_precision is None:
        return {}
    by_layer: dict[str, list[Site]] = {}
    for site in sites:
        by_layer.setdefault(site.name.rpartition(".")[0], []).append(site)
    if prior_precision == "marglik_per_layer":
        found = {layer: _best_for(own, curvature) for layer, own in by_layer.items()}
    else:
        value = _best_for(sites, curvature) if prior_precision == "marglik" else float(prior_precision)
        found = dict.fromkeys(by_layer, value)
    for layer, own in by_layer.items():
        for site in own:
            site.prior_precision.fill_(found[layer])
    return found


def _best_for(sites: Sequence[Site], curvature: Mapping[str, Tensor]) -> float:
    distance = sum(float((in_double(site.mean) - in_double(site.prior_mean)).square().sum()) for site in sites)
    values = torch.cat([in_double(curvature[site.name]).flatten() for site in sites])
    names = ", ".join(f"'{site.name}'" for site in sites[:3]) + (", ..." if len(sites) > 3 else "")
    if distance == 0:
        raise ValueError(
            f"prior_precision must be a number if all weights ({names}) are at their prior means, got 'marglik': "
            "the evidence grows without bound with it."
        )
    if not values.any():
        raise ValueError(
            f"prior_precision must be a number if the loss has no gradient in the weights ({names}), got 'marglik': "
            "the evidence grows without bound as it shrinks."
        )
    return best_prior_precision(values, distance)


def best_prior_precision(curvature: Tensor, distance: float) -> float:
    """Return the prior precision p0 that maximises the evidence, for posterior precisions h + p0.

        d log evidence / d log p0 = 1/2 [ sum_w h / (h + p0) - p0 sum_w (m - m0)^2 ]

    The first sum, the number of weights that the data determine, falls with p0, and the second term
    rises. So there is one root, and it is a maximum. Bisection on log p0 finds it between two bounds: the
    root if all weights were determined, and the root if only the weight with the largest h were.

    Source: MacKay 1992 ("A Practical Bayesian Framework for Backpropagation Networks"), with h fixed.

    Args:
        curvature: The h, float64, >= 0 and not all 0.
        distance: Sum of (m - m0)^2, > 0.
    """
    largest = float(curvature.max())
    low = 2 * largest / (largest * distance + math.sqrt(largest * distance * (largest * distance + 4)))
    high = curvature.numel() / distance
    while high > low * (1 + 1e-13):
        middle = math.sqrt(low * high)
        if float((curvature / (curvature + middle)).sum()) > middle * distance:
            low = middle
        else:
            high = middle
    return low


def _occam_factor(site: Site, curvature: Tensor) -> float:
    """Return the amount by which one tensor lowers the evidence: 1/2 sum [p0 (m - m0)^2 + log((h + p0) / p0)]."""
    prior_precision = in_double(site.prior_precision)
    scatter = prior_precision * (in_double(site.mean) - in_double(site.prior_mean)).square()
    return 0.5 * float((scatter + (in_double(curvature) / prior_precision).log1p()).sum())


def _own_card(card: Card, report: ConversionReport | None, examples: int, temperature: float) -> Card:
    """Return a card with what is known of the network without measuring it.

    A network whose layers were chosen here is no longer the one that the card's builder builds.
    """
    kept = {key: getattr(card, key) for key in ABOUT_DATA}
    if report is None:
        kept |= {"builder": card.builder, "kwargs": card.kwargs}
    return Card(
        **kept,
        dataset_size=examples,
        temperature=temperature,
        optimizer={"name": "Laplace"},
        method="linearised",
    )
