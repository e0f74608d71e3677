"""A step that several ranks make together: all of them, or none."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bayeslayers.distributed.lost import RankError
from bayeslayers.distributed.messages import Kind, Row, agree, exchange, is_distributed, telling_failures
from bayeslayers.optim.closure import ClosureDraws
from bayeslayers.optim.groups import Rules
from bayeslayers.optim.options import Options
from bayeslayers.optim.ranks import (
    all_layouts,
    copy_from_first_rank,
    rows_of_step,
    share_state,
    shares_of,
    statistics_of_norms,
    weighted_sum,
)
from bayeslayers.optim.shards import Shards

NO_DRAW = (
    "step() must follow a backward pass under drawn weights, got none since the last step. Pass a closure, or call "
    "loss.backward() inside `with optimizer.sampled():`."
)


class SharedStep(ClosureDraws):
    """Base of optimisers whose steps average over ranks.

    Each rank has its part of a batch. A step sends one row of numbers (`distributed.messages`), by which ranks know of
    each other's examples and failures, and then the means of gradients and statistics, weighted by the elements that
    each rank's loss is a mean over. All ranks then make the same step.

    Args:
        model: This and the following as for `AveragedDraws`.
        dataset_size: Number of training examples N, of all ranks together.
        rules: The check of each hyperparameter of a group.
        values: Their values.
        options: What else the user has chosen.
    """

    _of_squares: ClassVar[bool] = False  # whether statistics are sums of squares over the weighted elements of a loss

    def __init__(self, model: nn.Module, dataset_size: int, rules: Rules, values: Mapping[str, Any], options: Options):
        self._sharded = options.shard
        super().__init__(model, dataset_size, rules, values, options)
        if self.sync:
            if is_distributed():
                agree(self._facts())
            copy_from_first_rank(model.state_dict().values())
        self._shards: Shards | None = None
        if options.shard and not self.sync:
            raise ValueError("shard must be off without sync, which it divides among ranks. Pass sync=True.")
        if options.shard and is_distributed():
            self._shards = Shards(dist.get_rank(), dist.get_world_size())
            self._shards.deal(self._names)

    @abc.abstractmethod
    def _finish(self, left: bool = False) -> bool:
        """Move the posterior by the averages; return whether there were any."""

    def _facts(self) -> dict[str, Any]:
        """Return what must be the same on all ranks."""
        groups = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        return {
            "optimizer": type(self).__name__,
            "dataset_size": self.dataset_size,
            "shape of the parameters": {name: list(p.shape) for p, name in self._names.items()},
            "trainable parameters": {name: p.requires_grad for p, name in self._names.items()},
            "parameter groups": {str(number): group for number, group in enumerate(groups)},
            "num_samples": self.num_samples,
            "num_mc_groups": self.num_mc_groups,
            "shard": self._sharded,
        }

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Let ranks leave the scope after different numbers of steps: one that has left helps the others to end theirs.

        Without it a rank that has one batch fewer leaves the others waiting, until their time is out.
        """
        yield
        if self.sync and is_distributed():
            with torch.no_grad():
                while self._finish(left=True):
                    pass

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Tell the other ranks of an error of this one's part of a step, which all refuse then."""
        if not (self.sync and is_distributed()):
            yield
            return
        try:
            with telling_failures(Kind.REFUSED):
                yield
        except Exception as error:
            self._after_refusal(error)
            raise

    def _after_refusal(self, error: Exception) -> None:
        """Forget the draws of a refused step; those that follow it are again the same on all ranks."""
        self._forget()
        if self._generator is not None and (not isinstance(error, RankError) or error.refused):
            share_state(self._generator)

    def _average_over_ranks(self, left: bool) -> bool:
        """Replace gradients and statistics by their means over ranks; return False once all have left."""
        if not is_distributed():
            if self._averages.draws == 0:
                raise RuntimeError(NO_DRAW)
            self._averages.apply_scale()
            return True
        try:
            return self._meet(left)
        except RankError as error:
            self._after_refusal(error)
            raise

    def _meet(self, left: bool) -> bool:
        averages = self._averages
        layout = self._layout()
        weights = averages.weight, averages.square_weight
        rows = rows_of_step(Kind.LEFT if left else Kind.STEP, weights, averages.draws, layout)
        if all(row.kind is Kind.LEFT for row in rows):
            return False
        if sum(row.numbers[0] for row in rows) == 0:
            raise RuntimeError(NO_DRAW)
        self._refuse_unequal_shares(rows)
        averages.apply_scale()
        self._fill_gaps(all_layouts(layout, rows))
        averages.draws = max(1, averages.draws)
        self._reduce(rows)
        if self._generator is not None and len({row.numbers[1] for row in rows}) > 1:  # some have not drawn
            draws = [row.numbers[1] for row in rows]
            share_state(self._generator, draws.index(max(draws)))
        return True

    def _reduce(self, rows: Sequence[Row]) -> None:
        """Average gradients and statistics.

        Args:
            rows: Weight and draws of each rank.
        """
        if self._shards is not None:
            self._reduce_to_owners(self._shards, rows)
            return
        grads = [] if self._forwards.reduced else [p.grad for p in self._names if p.grad is not None]
        statistics = list(self._averages.statistics.values())
        share, of_squares = shares_of(rows, dist.get_rank())
        if self._of_squares and share != of_squares:
            for value in statistics:
                value.mul_(of_squares / share)
        weighted_sum([*grads, *statistics, *statistics_of_norms(self.model)], share, self._wire)

    def _reduce_to_owners(self, shards: Shards, rows: Sequence[Row]) -> None:
        """Average gradients and statistics on the ranks that move their parameters, and drop them on the others."""
        if self._forwards.reduced:
            raise ValueError(
                "shard must be off under DistributedDataParallel, which sends all gradients to all ranks. Use the "
                "model without the wrapper, with sync=True."
            )
        averages, (share, of_squares) = self._averages, shares_of(rows, shards.rank)
        shards.deal(self._names)
        self._moving = [p for p in self._names if p.grad is not None]
        grads = [(p, p.grad.mul_(share)) for p in self._moving if p.grad is not None]
        factor = of_squares if self._of_squares else share
        shards.sum_to_owners(
            [*grads, *((p, value.mul_(factor)) for p, value in averages.statistics.items())], self._wire
        )
        for parameter in self._moving:
            if not shards.owns(parameter):
                parameter.grad = None
                averages.statistics.pop(parameter, None)
        weighted_sum(statistics_of_norms(self.model), share)

    def _all_agree(self, harmless: bool) -> bool:
        """Return whether all ranks say so; where each moves its own parameters, none goes on before the others can."""
        if self._shards is None:
            return harmless
        return all(row.numbers[0] for row in exchange(Kind.STEP, harmless))

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Tell the other ranks of an error inside the scope, where each moves its own parameters."""
        with nullcontext() if self._shards is None else telling_failures(Kind.REFUSED):
            yield

    def _send_moved(self) -> None:
        """Send what this rank has moved to the others, where each moves its own parameters."""
        if self._shards is not None:
            precisions = [(p, self._sites[p].precision) for p in self._moving if p in self._sites]
            self._shards.send_to_all([*((p, p.data) for p in self._moving), *precisions])

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state; of all ranks, where it is in shards: all of them then call it together."""
        found = super().state_dict()
        if self._shards is not None:
            found["state"] = self._shards.whole_state(found["state"])
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, of any number of ranks."""
        super().load_state_dict(state_dict)
        if self._shards is not None:
            for parameter in self._names:
                if not self._shards.owns(parameter):
                    self.state.pop(parameter, None)

    def _refuse_unequal_shares(self, rows: list[Row]) -> None:
        """Refuse what `DistributedDataParallel` has averaged with equal weights, where they should differ."""
        if self._forwards.reduced and self.num_mc_groups > 1:
            raise ValueError(
                f"num_mc_groups must be 1 under DistributedDataParallel, which averages gradients of different draws, "
                f"got {self.num_mc_groups}. Use sync=True in its place."
            )
        if self._forwards.reduced and len({row.numbers[0] for row in rows}) > 1:
            counts = ", ".join(f"{row.numbers[0]:.0f}" for row in rows)
            raise ValueError(
                f"ranks must have equally many examples under DistributedDataParallel, whose averages weigh ranks "
                f"alike, got {counts}. Pass drop_last=True to the loader, or use sync=True in its place."
            )

    def _layout(self) -> list[list[Any]]:
        """Return what this rank sends: names, shapes and types, in an order that all ranks have."""
        grads = [
            ["gradient", name, list(p.shape), str(p.dtype)] for p, name in self._names.items() if p.grad is not None
        ]
        statistics = self._averages.statistics.items()
        return grads + [
            ["statistic", self._names.get(key, key), list(value.shape), str(value.dtype)] for key, value in statistics
        ]

    def _fill_gaps(self, layout: list[list[Any]]) -> None:
        """Put zeros in place of what other ranks have and this one does not, in the order of all."""
        parameters, device = {name: p for p, name in self._names.items()}, next(iter(self._names)).device
        statistics: dict[Any, Tensor] = {}
        for kind, name, shape, dtype in layout:
            if kind == "gradient":
                parameter = parameters[name]
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                continue
            key = parameters.get(name, name)
            value = self._averages.statistics.get(key)
            if value is None:
                value = torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=device)
            statistics[key] = value
        self._averages.statistics = statistics


def group_of(ranks: range) -> dist.ProcessGroup | None:
    """Return the process group of this rank's sample group, one of consecutive ranks; None for all or one alone.

    All ranks must call it.
    """
    size = dist.get_world_size() if is_distributed() else 1
    if len(ranks) in (1, size):
        return None
    groups = [dist.new_group(list(range(start, start + len(ranks)))) for start in range(0, size, len(ranks))]
    own = groups[ranks.start // len(ranks)]
    return own if isinstance(own, dist.ProcessGroup) else None
