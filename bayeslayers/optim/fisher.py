"""What K-FAC records: Kronecker factors of the Fisher and dense blocks, at labels drawn or the data's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one, fraction, network, non_negative, positive
from bayeslayers.convert.selection import Selectors
from bayeslayers.dtypes import full_precision
from bayeslayers.layers import BayesianLayer
from bayeslayers.layers.scope import OUTSIDE, current
from bayeslayers.likelihoods import Likelihood, check_likelihood, likelihood_of, sampled_loss
from bayeslayers.optim.averages import Recorded
from bayeslayers.optim.base import VariationalOptimizer
from bayeslayers.optim.dense import dense_blocks
from bayeslayers.optim.groups import listed
from bayeslayers.optim.options import Options
from bayeslayers.sampling import Site, Tracker, layers_with_curvature

Fisher = Literal["sampled", "empirical"]
Schedule = Callable[[int], int]

INPUT, OUTPUT = "_input_factor", "_output_factor"  # behind a weight's name, the names of its statistics
_RULES = {
    "lr": non_negative,
    "beta1": fraction,
    "factor_lr": partial(fraction, one=True),
    "temperature": positive,
    "damping": non_negative,
}


class FisherOptimizer(VariationalOptimizer):
    """An optimiser of layers whose curvature is structured: it sums the Fisher of each scope."""

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        values: Mapping[str, Any],
        options: Options,
        *,
        update_every: int,
        inverse_every: int | Schedule,
        inverse_tolerance: float,
        fisher: Fisher,
        likelihood: Likelihood | None,
        dense: Selectors | None,
    ):
        if fisher not in ("sampled", "empirical"):
            raise ValueError(f"fisher must be 'sampled' or 'empirical', got {fisher!r}.")
        self.update_every = at_least_one("update_every", update_every)
        if not callable(inverse_every):
            at_least_one("inverse_every", inverse_every)
        self.inverse_every = inverse_every
        self.inverse_tolerance = fraction("inverse_tolerance", inverse_tolerance)
        network("model", model)
        self.fisher, self.likelihood = fisher, likelihood or likelihood_of(model)
        if fisher == "sampled":
            check_likelihood(self.likelihood)
        options, self._from_curvature = options.with_precision_from_curvature()
        self._dense_selectors = dense
        super().__init__(model, dataset_size, _RULES, values, options)

    def _prepare(self) -> None:
        super()._prepare()
        blocks = list(dense_blocks(self.model, self._dense_selectors, self._sites))
        self._blocks = {site.mean: block for block in blocks for site in block.sites}
        dense = {block.layer for block in blocks}
        layers = layers_with_curvature(self._sites.values())
        self._tracker = Tracker(layers, kind="factors", model=self.model, dense=dense)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model; see `VariationalOptimizer.add_param_group`.

        Args:
            param_group: `params`, and any hyperparameter of their own. Weight and bias of a layer whose
                curvature has Kronecker factors belong together.

        Raises:
            ValueError: If they are in groups apart, and as there.
        """
        params = param_group["params"]
        group = {**param_group, "params": listed(params)}
        members = set(group["params"])
        for name, layer in self.model.named_modules():
            if isinstance(layer, BayesianLayer) and layer.factor_sizes() is not None:
                if {parameter in members for parameter in layer.parameters(recurse=False)} == {True, False}:
                    raise ValueError(
                        f"params must hold weight and bias of layer '{name}' or neither, got one of them: their "
                        "curvature is one matrix."
                    )
        super().add_param_group(group)

    @contextmanager
    def _scope(self, noise: Mapping[str, Tensor] | None) -> Iterator[None]:
        self._tracks = self._is_update()
        self._sums: dict[str, Tensor] = {}
        self._examples = 0
        with self._draw(noise):
            if not self._tracks:
                yield
                return
            samples = self.fisher == "sampled"
            hook = self.model.register_forward_hook(self._sample_labels) if samples else nullcontext()
            with hook, self._tracker.track():
                yield

    def _is_update(self) -> bool:
        """Whether the coming step moves the factors."""
        step = max((state.get("step", 0) for state in self.state.values()), default=0)
        return step % interval(self.update_every, step) == 0

    def _needs_place(self) -> bool:
        return self.fisher == "sampled" and self._is_update()

    def _sample_labels(self, model: nn.Module, inputs: Any, output: Any) -> None:
        """Add the factors at labels drawn given the output of a forward pass, before the pass of the user's loss."""
        if current() is OUTSIDE:  # another thread's call
            return
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the model's output must be a tensor under fisher='sampled', got {type(output).__name__}. Use "
                "fisher='empirical'."
            )
        if not output.requires_grad or not torch.is_grad_enabled():
            return
        with full_precision(output.device.type), self._losses_paused():
            sums, examples = self._tracker.sums_of(
                sampled_loss(self.likelihood, output, self._generator, self._forwards.place)
            )
        self._examples += examples
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    @contextmanager
    def _losses_paused(self) -> Iterator[None]:
        self._losses.paused = True
        try:
            yield
        finally:
            self._losses.paused = False

    def _clear_record(self) -> None:
        # Sampled factors stay: those of a forward pass whose backward is still to come are among them, and
        # none of them depends on the loss.
        if self.fisher == "empirical":
            self._tracker.clear()

    def _record(self) -> Recorded | None:
        if all(parameter.grad is None for parameter in self._names):
            return None
        if not self._tracks:
            return Recorded({})
        if self.fisher == "sampled":
            sums, examples, unit = self._sums, self._examples, 1
            if examples == 0:
                raise RuntimeError(
                    "the model must be called as a whole, not compiled, under fisher='sampled', for labels are drawn "
                    "from its output, got a gradient without. Use fisher='empirical'."
                )
        else:
            sums = {name: leaf.grad for name, leaf in self._tracker.leaves.items() if leaf.grad is not None}
            examples = self._tracker.examples
            unit = examples * self._elements(examples).number  # squares of a mean's gradients are this much smaller
        for parameter, site in self._sites.items():
            own = {site.name, self.weight_name(site) + INPUT}
            if parameter in self._blocks:
                own.add(self._blocks[parameter].statistic)
            if parameter.grad is not None and not own & sums.keys():
                raise self._without_its_layer(site)
        scales = {name: (1 if name.endswith(INPUT) else unit) / examples for name in sums}
        return Recorded({name: value * scales[name] for name, value in sums.items()})

    @staticmethod
    def weight_name(site: Site) -> str:
        return f"{site.name.removesuffix(site.key)}weight"

    def _rescale(self, loss_scale: float) -> None:
        """Take the loss scale out of what is squared from gradients of the user's loss."""
        if self.fisher == "empirical":
            statistics = self._averages.statistics
            for name, value in statistics.items():
                if not name.endswith(INPUT):
                    statistics[name] = value / loss_scale**self._loss_power


def interval(every: int, step: int) -> int:
    """Return the steps from one computation to the next: `every`, a tenth of the steps so far at most.

    The first factors are those of few examples: held for long, their inverse makes the steps diverge.
    """
    return min(every, max(step // 10, 1))
