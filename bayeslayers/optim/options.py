"""The options that the optimisers of a posterior share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from bayeslayers.checks import at_least_one, positive
from bayeslayers.optim.ranks import Sync


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an optimiser is told beside model, `dataset_size` and the hyperparameters of its groups.

    Attributes:
        groups: Groups with hyperparameters of their own, each a dict with `params`. Parameters in none of them form
            the default groups.
        deterministic_lr: Learning rate of the default group of deterministic parameters; None for `lr`.
        prior_precision: Prior precision of every site; None keeps what the layers carry.
        init_precision: Precision of every site at the start; None keeps what the layers carry. "curvature" takes it
            from the first batches, where the method has a curvature.
        num_samples: Draws per `step(closure)`.
        generator: Source of the draws; torch's default one if None.
        sync: Average over the ranks of the default process group before each step; "bfloat16" sends numbers in that
            type. A model in a `DistributedDataParallel` of several ranks turns it on.
        num_mc_groups: Sample groups: ranks of one group share their draws, those of different groups have draws of
            their own.
        shard: Keep the optimizer's state of each parameter on one rank alone, which moves it; needs `sync`.
        elements_per_example: Elements that an example's loss is a mean over; None for those that are seen.

    Raises:
        ValueError: If a value breaks its rule.
        TypeError: If a value is not a number where it must be one.
    """

    groups: Sequence[Mapping[str, Any]] | None = None
    deterministic_lr: float | None = None
    prior_precision: float | None = None
    init_precision: float | Literal["curvature"] | None = None
    num_samples: int = 1
    generator: torch.Generator | None = None
    sync: Sync = False
    num_mc_groups: int = 1
    shard: bool = False
    elements_per_example: float | None = None

    def __post_init__(self):
        at_least_one("num_samples", self.num_samples)
        at_least_one("num_mc_groups", self.num_mc_groups)
        for name in ("elements_per_example", "prior_precision"):
            if (value := getattr(self, name)) is not None:
                positive(name, value)

    @classmethod
    def among(cls, arguments: Mapping[str, Any], **changes: Any) -> Options:
        """Return the shared options among the arguments of a constructor, which spells its signature out for readers.

        Args:
            arguments: The constructor's `locals()`.
            changes: Options in the place of those.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: arguments[name] for name in names if name in arguments} | changes)

    def with_precision_from_curvature(self) -> tuple[Options, bool]:
        """Return the options with a number or None as `init_precision`, and whether it was "curvature" instead.

        Raises:
            ValueError: If it is another word.
        """
        if not isinstance(self.init_precision, str):
            return self, False
        if self.init_precision != "curvature":
            raise ValueError(f"init_precision must be a number > 0, None or 'curvature', got {self.init_precision!r}.")
        return dataclasses.replace(self, init_precision=None), True
