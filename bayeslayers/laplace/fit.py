"""Laplace approximation: a posterior for a network that is already trained, from one pass over the data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

import torch
from torch import nn

from bayeslayers.batches import Labelled, labelled_batches, with_progress
from bayeslayers.checks import network, positive
from bayeslayers.convert import ConversionReport, to_bayesian, to_deterministic
from bayeslayers.convert.selection import Selectors
from bayeslayers.curvature.accumulate import Kind
from bayeslayers.distributions.matrix_gaussian import without_scale
from bayeslayers.laplace.evidence import best_for
from bayeslayers.laplace.one_pass import Fisher, Question, one_pass
from bayeslayers.laplace.pieces import Piece, pieces
from bayeslayers.layers import PRIOR_ROOTS, BayesianLayer
from bayeslayers.layers.correlated import LARGEST_BLOCK, PRIOR_DENSE_ROOT
from bayeslayers.likelihoods import Likelihood, check_likelihood, likelihood_of
from bayeslayers.outputs import Output, check_output
from bayeslayers.sampling import Site, posterior
from bayeslayers.storage.card import ABOUT_DATA, Card
from bayeslayers.unwrap import unwrapped

Network = TypeVar("Network", bound=nn.Module)
PriorPrecision = float | Literal["marglik", "marglik_per_layer"] | None
Curvature = Literal["diagonal", "kron", "full"]
_KINDS: dict[str, Kind] = {"diagonal": "squares", "kron": "factors", "full": "block"}


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
        curvature: That of each layer: "diagonal", "kronecker" or "dense".
    """

    log_marginal_likelihood: float
    log_likelihood: float
    dataset_size: int
    prior_precision: Mapping[str, float]
    report: ConversionReport | None
    curvature: Mapping[str, str] = field(default_factory=dict)


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
    curvature: Curvature = "diagonal",
) -> Network:
    """Return a trained network with its Laplace posterior; its attribute `laplace` is the `LaplaceFit`.

        p = (1/T) P sum_i (grad loss_i(m))^2 + p0

    for losses that are means over P elements of an example, such as the pixels of an image: each example
    counts as one observation, whatever P. Ignored labels (-100) count in neither N nor P.

    The weights m do not change. One pass over the data, in eval mode, gives the sum of squared
    per-example gradients, the diagonal of the empirical Fisher matrix, which stands in for the Hessian. The
    pass also gives the evidence, which "marglik" maximises over the prior precision:

        log p(data | p0) ~ -(1/T) sum_i loss_i(m) - 1/2 sum_w [p0 (m - m0)^2 + log(p / p0)]

    Under `curvature` "kron" and "full" the squares are outer products, p and p0 are matrices, and the last term is the
    log of a ratio of determinants.

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
            likelihood draws, whose mean is the Fisher information; "exact" sums over all labels, by one backward pass
            for each output, which gives the Fisher information itself, the Gauss-Newton matrix. Where the data is
            fitted well, the first are much smaller.
        generator: Source of the drawn labels; torch's default one if None.
        curvature: "diagonal"; "kron" for Kronecker factors of the curvature of each linear layer and convolution, with
            the eigenvalues of both and without further approximation; "full" for all entries of the curvature of each
            such layer, of at most 6,000 weights. Layers of other kinds are diagonal either way, and layers are
            independent. `net.laplace.curvature` says which each layer has.

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
    _check_choice("curvature", curvature, tuple(_KINDS))
    _check_choice("fisher", fisher, ("empirical", "sampled", "exact"))
    if isinstance(prior_precision, str):
        if prior_precision not in ("marglik", "marglik_per_layer"):
            raise ValueError(
                "prior_precision must be a number > 0, 'marglik', 'marglik_per_layer' or None, got "
                f"{prior_precision!r}."
            )
    elif prior_precision is not None:
        positive("prior_precision", prior_precision)
    meaning = likelihood or likelihood_of(model)
    if fisher == "sampled":
        check_likelihood(meaning)
    net, report = _bayesian_copy(cast(Network, unwrapped(model)), layers)
    sites = list(posterior(net))
    if curvature == "full":
        _refuse_large(net)
    if prior is not None:
        _take_prior(sites, prior)
        prior_precision = None
    batches = labelled_batches(
        "data", with_progress("laplace", data) if progress and not isinstance(data, tuple) else data
    )
    asked = Question(meaning, _KINDS[curvature], fisher, elements_per_example, output, generator)
    sums = one_pass(net, sites, batches, asked)
    found = pieces(sites, sums.curvature, sums.examples, temperature)
    chosen = _set_prior_precision(found, prior_precision)
    with torch.no_grad():
        lost = sum(piece.write() for piece in found)
    card = getattr(net, "card", None)
    net.__dict__["card"] = _own_card(card if isinstance(card, Card) else Card(), report, sums.examples, temperature)
    if likelihood is not None or likelihood_of(net) != meaning:
        net.__dict__["likelihood"] = meaning
    kinds = {piece.layer: type(piece).__name__.lower() for piece in found}
    evidence = sums.log_likelihood / temperature - lost
    net.__dict__["laplace"] = LaplaceFit(evidence, sums.log_likelihood, sums.examples, chosen, report, kinds)
    return net


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}, got {value!r}.")


def _refuse_large(net: nn.Module) -> None:
    """Raise if a layer that would get a dense curvature has too many entries."""
    for name, layer in net.named_modules():
        if isinstance(layer, BayesianLayer) and layer.factor_sizes() is not None:
            entries = sum(tensor.numel() for tensor in layer.own_tensors().values())
            if entries > LARGEST_BLOCK:
                raise ValueError(
                    f"a layer must have at most {LARGEST_BLOCK:,} weights under curvature='full', got '{name}' with "
                    f"{entries:,}. Use curvature='kron', or choose other layers, such as layers=bl.last_layer."
                )


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
            if isinstance(site.module, BayesianLayer) and isinstance(old.module, BayesianLayer):
                site.module.set_prior_correlations(old.module.prior_correlations)
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
        if isinstance(site.module, BayesianLayer) and isinstance(old.module, BayesianLayer):
            buffers = {} if (root := old.module.dense_root) is None else {PRIOR_DENSE_ROOT: root}
            if (roots := old.module.roots) is not None:
                buffers = dict(zip(PRIOR_ROOTS, without_scale(*roots, old.module.root_scale), strict=True))
            site.module.set_prior_correlations({k: v.to(site.mean.device).clone() for k, v in buffers.items()})


def _set_prior_precision(found: Sequence[Piece], prior_precision: PriorPrecision) -> dict[str, float]:
    """Write the prior precision to the sites, and return it by layer."""
    if prior_precision is None:
        return {}
    by_layer: dict[str, list[Piece]] = {}
    for piece in found:
        by_layer.setdefault(piece.layer, []).append(piece)
    if prior_precision == "marglik_per_layer":
        chosen = {layer: _best(own) for layer, own in by_layer.items()}
    else:
        value = _best(found) if prior_precision == "marglik" else float(prior_precision)
        chosen = dict.fromkeys(by_layer, value)
    for layer, own in by_layer.items():
        for site in (site for piece in own for site in piece.sites):
            site.prior_precision.fill_(chosen[layer])
            if isinstance(site.module, BayesianLayer):
                site.module.drop_prior_roots()
    return chosen


def _best(found: Sequence[Piece]) -> float:
    """Return the prior precision of some pieces that maximises the evidence."""
    names = [site.name for piece in found for site in piece.sites]
    return best_for(names, [piece.eigenvalues() for piece in found], sum(piece.distance for piece in found))


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
