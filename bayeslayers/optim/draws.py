"""The recording half of an optimiser's life: scopes, and the means over what they leave behind."""

from __future__ import annotations

import abc
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayeslayers.checks import network
from bayeslayers.curvature.counts import Reduction
from bayeslayers.curvature.elements import Elements, LossFunctions
from bayeslayers.distributed.messages import is_distributed
from bayeslayers.layers import BayesianLayer
from bayeslayers.optim.amp import LossScale
from bayeslayers.optim.averages import Averages, Gradients, Recorded, kept_gradients, set_gradients
from bayeslayers.optim.groups import PosteriorGroups, Rules
from bayeslayers.optim.options import Options
from bayeslayers.optim.ranks import (
    Forwards,
    local_groups,
    ranks_of_group,
    refuse_no_group,
    refusing_unnoticed_wrapper,
    shared_generator,
    spans_ranks,
    wire_dtype,
)
from bayeslayers.readings import Readings
from bayeslayers.sampling import Site
from bayeslayers.sampling.sharing import in_use


class AveragedDraws(PosteriorGroups):
    """Base of optimisers that average gradients and statistics over draws of the weights.

    After a `sampled()` scope each parameter's `.grad` holds the mean over the draws since the last
    step, so gradient clipping between scope and step works as usual.

    Args:
        model: This and the following as for `PosteriorGroups`.
        dataset_size: Number of training examples N.
        rules: The check of each hyperparameter of a group.
        values: Their values.
        options: What else the user has chosen.
    """

    _sampling_counterpart: ClassVar[str | None] = None  # the method that draws weights, for one that computes at means
    loss_reduction: Reduction = "mean"  # what the loss is of those of the examples
    loss_weight: float | None = None  # what a weighted mean is divided by, where ranks share a step; None: its elements
    _keeps_roots: ClassVar[bool] = False  # moves matrix-variate posteriors as such

    def __init__(self, model: nn.Module, dataset_size: int, rules: Rules, values: Mapping[str, Any], options: Options):
        self.elements_per_example = options.elements_per_example
        self.num_samples = int(options.num_samples)
        self._wire = wire_dtype(options.sync)
        self.sync = bool(options.sync) or spans_ranks(model)
        self.num_mc_groups = int(options.num_mc_groups)
        self._inside = False  # an open scope
        self._losses, self._forwards = LossFunctions(), Forwards()
        self._spent: list[weakref.ref[Tensor]] = []  # gradients that the last step has used
        self._group_generators: list[torch.Generator] = []
        self._forget()
        self._groups, self._sharing = range(self.num_mc_groups), range(1)  # of this rank; ranks of the same draws
        if self.sync:
            refuse_no_group()  # before the model changes
            network("model", model)
            self._groups = local_groups(self.num_mc_groups)
            self._sharing = ranks_of_group(self.num_mc_groups)
            own = shared_generator(options.generator, next(model.parameters()).device)
            options = dataclasses.replace(options, generator=own)
        self._group, self._part_weight = self._groups[0], 1  # examples of the present group's part of a batch
        super().__init__(model, dataset_size, rules, values, options)

    @abc.abstractmethod
    def _scope(self, noise: Mapping[str, Tensor] | None) -> AbstractContextManager[Any]:
        """Return the scope of one draw, in which what the method needs is recorded."""

    @abc.abstractmethod
    def _record(self) -> Recorded | None:
        """Return what the last scope left, or None if nothing went backward in it."""

    def _clear_record(self) -> None:
        """Drop what the open scope has recorded so far."""

    def _draw(self, noise: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        """Return the scope of a draw of the weights; of the means, for a method that draws none."""
        if self._sampling_counterpart is None:
            return self._sampler.draw(noise)
        if noise is not None:
            raise ValueError(
                f"noise must be None without draws, got values for weights. Use {self._sampling_counterpart}."
            )
        return nullcontext()

    @staticmethod
    def _without_its_layer(site: Site) -> RuntimeError:
        """Return the error for a gradient without a statistic."""
        if not isinstance(site.module, BayesianLayer):
            return RuntimeError(
                f"parameter '{site.name}' must be read in a call of the model as a whole, neither compiled nor under "
                f"vectorise. Call the model so, exclude ['{site.name}'] from the Bayesian ones, or use IVON."
            )
        return RuntimeError(
            f"parameter '{site.name}' must get its gradient through its own layer, but was used without calling it. "
            "Read it by calling the layer, or use an ordinary parameter."
        )

    @contextmanager
    def sampled(self, noise: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Draw weights for the scope, and add its gradient and statistics to the running average.

        Several backward passes inside one scope are parts of one batch (accumulation): with a mean
        loss, divide each by their number. Several scopes before a step are draws, and averaged here.

        Args:
            noise: Standard normal values by parameter name, in place of drawn ones.
        """
        with self._recording(lambda: self._scope(noise)):
            yield

    @contextmanager
    def _recording(self, scope: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Run a scope, and fold what it recorded into the averages; undo everything if it raises."""
        if self._inside:
            raise RuntimeError("sampled() must not be nested in itself; leave one scope before the next.")
        self._begin_again_after_new_prior()
        if not self._keeps_roots:
            self._drop_roots()
        if all(p.grad is None for p in self._names):  # cleared past the optimizer: no draw to average with
            self._forget()
        earlier = kept_gradients(self._names, self._spent)
        set_gradients(self._names, repeat(None))
        self._losses.clear()
        try:
            with in_use(self.model, trains=True), self._watched(), self._own_draws(), scope(), self._losses:
                self._inside = True
                yield
            self._collect(earlier)
        except BaseException:
            set_gradients(self._names, earlier)
            raise
        finally:
            self._inside = False

    @torch.no_grad()
    def _collect(self, earlier: Gradients) -> None:
        """Fold the scope's gradients and statistics into the means over draws."""
        recorded = self._record()
        if recorded is None:
            set_gradients(self._names, earlier)
            return
        self._averages.add(recorded, self._names, earlier, self._part_weight)
        if self.sync:
            self._averages.add_weight(self._weight(), self.loss_weight)

    # What matters where several ranks, or sample groups, make a step together.

    def part(self, count: int) -> slice:
        """Return which of this rank's examples the present draw is for: all, but for several sample groups of a rank.

        Args:
            count: Number of this rank's examples.
        """
        index, groups = self._group - self._groups[0], len(self._groups)
        own = slice(index * count // groups, (index + 1) * count // groups)
        self._part_weight = (own.stop - own.start) or 1 if groups > 1 else 1
        return own

    def _watched(self) -> AbstractContextManager[None]:
        if not self.sync:
            return refusing_unnoticed_wrapper(self.model)
        wanted = self._needs_place() and is_distributed()
        return self._forwards.watched(self.model, self._sharing if wanted else None)

    def _needs_place(self) -> bool:
        """Whether what a scope draws depends on which examples of the batch a rank has."""
        return False

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Draw from the generator of the present sample group inside the scope.

        A step seeds the generators of all its groups at once, so that they do not depend on how many ranks there are.
        """
        if self.num_mc_groups == 1:
            yield
            return
        if not self._group_generators:
            device = next(iter(self._sites)).device
            seeds = torch.randint(2**62, (self.num_mc_groups,), generator=self._generator, device=device).tolist()
            self._group_generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        shared = self._generator
        self._generator = self._sampler.generator = self._group_generators[self._group]
        try:
            yield
        finally:
            self._generator = self._sampler.generator = shared

    def _weight(self) -> float:
        """Return how many elements the loss of the last scope is a mean over, by which ranks count."""
        rows = self._forwards.rows
        if self.loss_reduction == "sum":
            return rows or 1
        try:
            return self._losses.elements(rows, self.elements_per_example).number or 1
        except ValueError:  # of losses that differ, which matters for squares alone
            return rows or 1

    def _forget(self) -> None:
        """Drop the draws since the last step."""
        self._averages = Averages()
        self._group_generators = []
        self._seen: Callable[[], Elements] | None = None
        self._loss_scale = LossScale()
        self._readings = Readings()

    def _elements(self, examples: int) -> Elements:
        """Return what the losses of the last scope are means over."""
        return self._elements_later(examples)()

    def _elements_later(self, examples: int) -> Callable[[], Elements]:
        """Return what will return what the losses of the last scope are means over.

        Several losses are read now, for those that do not go together end the scope with an error.
        """
        seen = self._losses.seen()
        values = self._readings.later(seen.tensors())
        found = functools.cache(lambda: seen.elements(values(), examples, self.elements_per_example))
        if len(seen.terms) > 1:
            found()
        self._seen = found
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; inside a scope those of this draw alone, outside one those of every draw."""
        with torch._C.DisableTorchFunction():  # the open scope looks at functions, and would at each of these tensors
            super().zero_grad(set_to_none)
            if self._inside:
                self._losses.clear()
                self._clear_record()
            else:
                self._forget()
