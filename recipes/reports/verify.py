"""Whether a posterior does what its card says: its metrics measured again beside the claimed ones.

A metric is an average over draws, so another seed or another release of torch gives another value. How
far apart two measurements may be is estimated by the bootstrap over draws (Efron 1979). Whole draws
are resampled, in blocks, for one draw moves all examples at once. Metrics without draws, at the
posterior means, must agree to rounding.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.files import write_atomically
from bayeslayers.likelihoods import likelihood_of
from bayeslayers.prediction import Prediction, predict
from bayeslayers.storage.model_card import model_card
from bayeslayers.storage.posterior import read_posterior
from bayeslayers.storage.weight_file import PICTURE, README
from recipes.data.slices import sliced
from recipes.data.split import NAMES
from recipes.reports.prediction_metrics import suffix, target_metrics, with_errors_found
from recipes.reports.verify_data import InMemory, as_predicted, read_slice, read_test_split

BLOCKS, RESAMPLES = 16, 64  # blocks of draws, and bootstrap samples of them
DEVIATIONS = 6.0  # tolerated standard deviations: 1 metric in 40,000 by chance, by Student's t of 15 degrees
LARGEST_SEED = 2**63 - 1
MAX_SAMPLES = 10_000  # a card is not to be trusted with the time of whoever verifies it
_SETTINGS = ("test_examples", "num_samples", "seed")


@dataclass(frozen=True)
class Check:
    """One claimed metric beside the measured one, or None for a metric that `verify` does not know."""

    posterior: str
    data: str
    metric: str
    claimed: float
    measured: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether they agree."""
        return self.measured is not None and abs(self.claimed - self.measured) <= self.tolerance


def verify(name: str | Path, data_root: str | Path | None = None, seed: int | None = None) -> list[Check]:
    """Re-evaluate a posterior, and compare each metric with its card's.

    A card with `verification` is checked on the bundled slice. The card's `metrics` are checked on the
    whole test split where `data_root` is given, or there is no `verification`; of a segmentation
    on so many of its pictures as memory holds. OOD metrics of data that has no name in `load_split` are not measured.

    Args:
        name: A posterior, as for `zoo.load`.
        data_root: Folder of data, as for `load_split`.
        seed: Of the draws; None for the card's.

    Raises:
        ValueError: If there is no such posterior, its files are bad, its data is none that can be loaded or does not
            fit its likelihood, or its card claims nothing.
    """
    model = zoo.load(name)
    card = zoo.card_of(model)
    if not (card.verification or card.metrics):
        raise ValueError(f"card of {card.name!r} must claim metrics, got none.")
    checks = []
    if card.verification:
        known = read_slice(_dataset(card), card)
        ood = {name: read_slice(name, card) for name in _ood_names(card.verification)}
        checks += compare(model, card.verification, known, ood, f"{_dataset(card)} slice", seed)
    if data_root is not None or not card.verification:
        known = read_test_split(_dataset(card), data_root, card)
        reachable = [name for name in _ood_names(card.metrics) if name in (*NAMES, *sliced())]
        ood = {name: read_test_split(name, data_root, card) for name in reachable}
        checks += compare(model, card.metrics, known, ood, _dataset(card), seed)
    return checks


def record(name: str | Path) -> bl.Card:
    """Measure a posterior on the bundled slices, and write the metrics to its folder as its `verification`.

    Args:
        name: A bundled name or a folder, which is rewritten but for its picture. Its card's metrics say how many draws
            and which OOD data; sets without a slice are left out.

    Raises:
        ValueError: If there is no such posterior, its files are bad, or its data has no slice.
    """
    if str(name) not in zoo.list_posteriors() and not Path(name).is_dir():
        raise ValueError(f"posterior must be a bundled name or a folder to record in, got {str(name)!r}.")
    folder = zoo.resolve(name)
    model = zoo.load(folder)
    card = zoo.card_of(model)
    known = read_slice(_dataset(card), card)
    ood = {name: read_slice(name, card) for name in _ood_names(card.metrics) if name in sliced()}
    of_means = card.metrics.get("num_samples", 0) < 2
    num_samples, seed = _settings({} if of_means else card.metrics, None)
    values, _ = measure(model, known, ood, num_samples, seed)
    settings = {"test_examples": len(known), "num_samples": num_samples, "seed": seed}
    rounded = {key: round(value, 5) for key, value in values.items() if not math.isnan(value)}
    half, picture = read_posterior(folder).half, folder / PICTURE
    kept = picture.read_bytes() if picture.is_file() else None
    card = bl.save_posterior(model, folder, name=card.name, verification=rounded | settings, half=half)
    if kept is not None:
        write_atomically(picture, kept)
        write_atomically(folder / README, model_card(card, picture=True).encode())
    return card


def compare(
    model: nn.Module,
    claimed: Mapping[str, float],
    known: InMemory,
    ood: Mapping[str, InMemory],
    data: str,
    seed: int | None = None,
) -> list[Check]:
    """Return a check of every claimed metric.

    Two measurements differ by sqrt(2) of the standard error of one. Where the claim was measured on
    another number of examples, those count as a part of these or the other way round, and the
    difference of such means is allowed for.

    Args:
        model: A posterior of the zoo.
        claimed: Metrics, with `num_samples`, `seed` and `test_examples` of the claim.
        known: Examples to measure on.
        ood: Examples of other data sets.
        data: Name of the examples.
        seed: Of the draws; None for the claim's.
    """
    of = _whole(claimed, "test_examples", 0, 0, LARGEST_SEED)
    values, errors = measure(model, known, ood, *_settings(claimed, seed), of=of)
    name, checks = zoo.card_of(model).name, []
    for metric, claim in claimed.items():
        if metric in _SETTINGS:
            continue
        rounding = 1e-5 + 1e-4 * abs(claim) + (2 / len(known) if metric == "accuracy" else 0)
        tolerance = max(DEVIATIONS * errors.get(metric, 0.0), rounding)
        checks.append(Check(name, data, metric, float(claim), values.get(metric), tolerance))
    return checks


def measure(
    model: nn.Module,
    known: InMemory,
    ood: Mapping[str, InMemory],
    num_samples: int,
    seed: int,
    of: int = 0,
) -> tuple[dict[str, float], dict[str, float]]:
    """Return metrics, and the standard deviation of the difference to another measurement of each.

    Args:
        model: A posterior.
        known: Examples of its data set.
        ood: Examples of others, by name.
        num_samples: Draws, >= 2.
        seed: Of the draws.
        of: Number of examples of the other measurement; 0 for these examples.
    """
    if (kind := likelihood_of(model).name) == "gaussian" and not known.targets.is_floating_point():
        raise ValueError(
            f"likelihood must be categorical for data of classes, got {kind}. Correct the posterior's card."
        )
    splits = {"": known, **ood}
    draws = {
        name: _draw_blocks(model, split, num_samples, seed, kind == "gaussian" and not name)
        for name, split in splits.items()
    }
    counts = torch.tensor([block.num_samples for block in draws[""]], dtype=torch.float64)
    parts = {name: _pool(blocks, counts) for name, blocks in draws.items()}
    generator = torch.Generator().manual_seed(0)  # of the bootstrap: the same tolerance each time
    resampled = []
    for _ in range(RESAMPLES):
        repeats = torch.randint(len(counts), counts.shape, generator=generator).bincount(minlength=len(counts))
        resampled.append(
            with_errors_found({name: _pool(b, counts * repeats) for name, b in draws.items()}, known.targets)
        )
    # Two measurements differ; and n resampled blocks spread (n - 1) / n as much as n new ones.
    correction = 2 * len(counts) / (len(counts) - 1)
    variance = {key: correction * spread for key, spread in _variances(resampled).items()}
    if of not in (0, len(known)):
        resampled = []
        for _ in range(RESAMPLES):
            index = {name: torch.randint(len(s), (len(s),), generator=generator) for name, s in splits.items()}
            chosen = {name: _select(part, index[name]) for name, part in parts.items()}
            resampled.append(with_errors_found(chosen, known.targets[index[""]]))
        variance = {key: v + abs(len(known) / of - 1) * _variances(resampled)[key] for key, v in variance.items()}
    network = as_predicted(model)
    means = {
        name: predict(network, split.inputs(slice(None)), method="mean", batch_size=1000)
        for name, split in splits.items()
    }
    exact = {
        "nll_at_means": target_metrics(means[""], known.targets)["nll"],
        **{f"total{suffix(name)}_at_means": float(part.total.double().mean()) for name, part in means.items()},
        "kl": float(bl.kl_divergence(model).detach()),
    }
    return with_errors_found(parts, known.targets) | exact, {key: math.sqrt(value) for key, value in variance.items()}


def _draw_blocks(
    model: nn.Module, split: InMemory, num_samples: int, seed: int, scored: bool = False
) -> list[Prediction]:
    """Return predictions by blocks of draws, which together are those of one `predict` by the card's method.

    Where `scored`, they have the log density of the targets.
    """
    generator = torch.Generator().manual_seed(seed)
    number = min(BLOCKS, num_samples)
    sizes = [num_samples // number + (block < num_samples % number) for block in range(number)]
    x = split.inputs(slice(None))
    how: Any = zoo.card_of(model).method
    target = split.targets if scored else None
    network = as_predicted(model)
    return [
        predict(network, x, size, method=how, batch_size=1000, generator=generator, target=target) for size in sizes
    ]


def _pool(blocks: Sequence[Prediction], counts: Tensor) -> Prediction:
    """Return the prediction over all blocks of draws, each counted that often."""
    # Divided by last: whole numbers keep the mean of probabilities at most 1, for rounding is monotone.
    mean, aleatoric = (
        torch.tensordot(counts, torch.stack([getattr(block, part) for block in blocks]).double(), 1) / counts.sum()
        for part in ("mean", "aleatoric")
    )
    variance = torch.zeros_like(mean)
    if not blocks[0].likelihood.discrete:  # within blocks and between them
        within = torch.stack([block.epistemic + (block.mean - mean).square() for block in blocks]).double()
        variance = torch.tensordot(counts, within, 1) / counts.sum()
    total, epistemic = blocks[0].likelihood.split(mean, variance, aleatoric)
    log_prob = None
    if logs := [block.log_prob for block in blocks if block.log_prob is not None]:
        log_prob = (torch.stack(logs).double() + counts.log().unsqueeze(1)).logsumexp(0) - counts.sum().log()
    return dataclasses.replace(
        blocks[0], mean=mean, total=total, aleatoric=aleatoric, epistemic=epistemic, log_prob=log_prob
    )


def _select(prediction: Prediction, index: Tensor) -> Prediction:
    chosen = {key: getattr(prediction, key)[index] for key in ("mean", "total", "aleatoric", "epistemic")}
    log_prob = None if prediction.log_prob is None else prediction.log_prob[index]
    return dataclasses.replace(prediction, **chosen, log_prob=log_prob)


def _variances(resampled: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the variance of each metric over the bootstrap samples that have it."""
    values = {key: torch.tensor([found[key] for found in resampled], dtype=torch.float64) for key in resampled[0]}
    there = {key: value[value.isfinite()] for key, value in values.items()}
    return {key: float(value.var()) if len(value) > 1 else math.inf for key, value in there.items()}


def _settings(claimed: Mapping[str, float], seed: int | None) -> tuple[int, int]:
    """Return number and seed of the draws of a claim."""
    num_samples = _whole(claimed, "num_samples", 64, 2, MAX_SAMPLES, " --record measures with more draws.")
    own = _whole(claimed, "seed", 0, 0, LARGEST_SEED)
    return num_samples, own if seed is None else seed


def _whole(claimed: Mapping[str, float], name: str, default: int, least: int, most: int, advice: str = "") -> int:
    """Return a setting of a claim, which anyone may have written."""
    value = claimed.get(name, default)
    if not (least <= value <= most and value == int(value)):
        raise ValueError(f"card's {name} must be from {least} to {most}, got {value}.{advice}")
    return int(value)


def _dataset(card: bl.Card) -> str:
    """Return the name of the data set, the first word of what the card says of it."""
    return card.dataset.partition(" ")[0]


def _ood_names(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the data sets whose OOD metrics tell them from the posterior's own."""
    return sorted({found[1] for key in metrics if (found := re.fullmatch("ood_auroc_(.+?)(_epistemic)?", key))})
