"""An optimiser's life: prepare, then record and update once a step, and finalize.

prepare            __init__ and `add_param_group`: what is uncertain in the model, and what the scopes need
(scope, record)    `sampled()` or `step(closure)`: one draw, its gradient and its statistics (`draws`)
plan, update       `step`: checks, what may fail, then the move of all groups or of none
finalize           writes the posterior, where the steps have not
"""

from __future__ import annotations

import abc
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayeslayers.curvature.elements import refuse_other_reduction
from bayeslayers.method import predict_by_samples
from bayeslayers.optim.adam import adam_update
from bayeslayers.optim.bounded_step import BoundedStep
from bayeslayers.optim.bounds import is_harmless
from bayeslayers.optim.guard import Snapshot, all_finite, refuse_not_finite
from bayeslayers.optim.shared_step import NO_DRAW
from bayeslayers.sampling.sharing import in_use


class VariationalOptimizer(BoundedStep):
    """Base of the optimisers of a posterior. A method says what a scope records and how a group moves.

    It must have `_scope`, `_record` and `_update`. It may extend `_prepare`, `_clear_record`, `_plan`,
    `_update_deterministic`, `_reach` (or `_posterior_reach`), `_posterior_bound`, and `finalize`.
    `docs/extend_optimiser.md` shows how.

    Args:
        model: Model on its device already. One without any posterior becomes Bayesian in place.
        dataset_size: Number of training examples N.
        rules: The check of each hyperparameter of a group, `lr` and `beta1` among them.
        values: Their values, among others.
        options: What else the user has chosen.
    """

    _step_supports_amp_scaling = True  # see `amp.LossScale`
    _statistic: ClassVar[str] = "curvature"  # what messages call the statistics
    _loss_power: int = 2  # the power of the loss they are proportional to

    @abc.abstractmethod
    def _update(self, group: dict[str, Any]) -> None:
        """Move the posterior of one group's uncertain parameters by the averages over draws."""

    def _update_deterministic(self, group: dict[str, Any]) -> None:
        """Move one group's parameters that are not uncertain."""
        adam_update(group["params"], group, self.state)

    def _plan(self) -> None:
        """Compute what may fail in the updates of any group, before one of them changes anything.

        Raises:
            FloatingPointError: If the step must be refused.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the posterior from the draws since the last step.

        Args:
            closure: Clears gradients, computes the loss, calls `backward` and returns `loss` or
                `(loss, output)`. It runs under `num_samples` draws. Without it, the draws are those
                of `with optimizer.sampled():` scopes since the last step.

        Returns:
            With a closure the mean over draws of the loss, and of the output if it returns one (a
            tensor is averaged, anything else is that of the last draw); None without one.

        Raises:
            FloatingPointError: If loss, gradient or statistic is not finite. The posterior and the
                optimizer's state are then as they were.
            RuntimeError: If there was no draw since the last step, the scope of one is open, or a CUDA graph is being
                captured.
        """
        if next(iter(self._names)).is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() must run outside of a CUDA graph, got the capture of one: a replay would repeat the learning "
                "rate and bias corrections of this step. Capture forward and backward alone, and call step() after it."
            )
        if self._inside:
            raise RuntimeError(
                "step() must follow the scope `with optimizer.sampled():`, got it inside. Call it after the scope."
            )
        with in_use(self.model, trains=True):
            return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        with self._together():
            loss, output = (None, None) if closure is None else self._run(closure)
            if self._is_left_out():
                return None
            if self._averages.draws == 0 and not self.sync:
                raise RuntimeError(NO_DRAW)
            if not self.sync:
                self._foresee()
            self._refuse_other_use()
            if self.sync:  # a rank tells the others of its own numbers, before they are one
                self._check_numbers()
        self._finish()
        return loss if output is None else (loss, output)

    def _finish(self, left: bool = False) -> bool:
        """Move the posterior by the averages; return whether there were any.

        Args:
            left: This rank has no data any more, and takes part in the others' steps.
        """
        if self.sync:
            self._drop_bundles()  # of this rank's own numbers
            if not self._average_over_ranks(left):
                return False
        try:
            with self._failing_together():
                harmless = self._is_foreseen_harmless()
                if not harmless:
                    self._check_numbers()
                    self._plan()
                    harmless = all(is_harmless(self._reach(group), group["params"]) for group in self.param_groups)
            self._move(self._all_agree(harmless))
        except FloatingPointError:
            self._forget()
            raise
        predict_by_samples(self.model)
        self._spent = [weakref.ref(p.grad) for p in self._names if p.grad is not None]
        self._forget()
        return True

    def _check_numbers(self) -> None:
        if self._averages.draws > 0:
            self._refuse_bad_numbers()

    def _lr(self, group: Mapping[str, Any]) -> float:
        """Return the step size of a group's natural-gradient step."""
        return group["lr"]

    def effective_lr(self, parameter: nn.Parameter) -> Tensor:
        """Return lr ess / precision: by how many loss gradients each entry of a mean moves in a natural-gradient step.

        That is the learning rate of an SGD that would move it as far, without momentum, prior and a bound on the step.

        Args:
            parameter: An uncertain tensor that the optimizer trains.

        Raises:
            ValueError: If the optimizer does not train it, or it has no posterior.
        """
        for group in self.param_groups:
            if parameter in self._sites and any(parameter is p for p in group["params"]):
                return self._lr(group) * self._ess(group) / self._sites[parameter].precision
        raise ValueError("parameter must be an uncertain tensor that the optimizer trains, got another.")

    def finalize(self) -> None:
        """Write the posterior to the model. Call it when training ends, before predicting and saving.

        The methods that move the posterior in each step, as VOGN, have done so: then it changes nothing.
        """

    @property
    def steps_to_posterior(self) -> int:
        """The number of steps after which there is a posterior that `finalize` can write."""
        return 0

    def unscale_(self, scaler: torch.amp.GradScaler) -> None:
        """Take a gradient scaler's factor out of gradients and statistics, to clip gradients before the step.

        It stands for `scaler.unscale_(optimizer)`, which cannot know of the statistics.
        """
        if scaler.is_enabled():
            self._rescale(self._loss_scale.unscale(self, scaler))

    def _is_left_out(self) -> bool:
        """Take the factor of a gradient scaler out, and return whether the scaler leaves the step out."""
        overflows, scale = self._loss_scale.handed_over(self, self._statistic, self._readings)
        if overflows:
            self._forget()
        if scale is not None:
            self._drop_bundles()
            for parameter in self._names:
                if parameter.grad is not None:
                    parameter.grad /= scale
            self._rescale(scale)
        return overflows

    def _rescale(self, loss_scale: float) -> None:
        """Take the loss scale out of the statistics."""
        self._averages.scale /= loss_scale**self._loss_power

    def _refuse_other_use(self) -> None:
        """Raise if the loss is another kind of mean than the optimizer was told."""
        if self._seen is not None:
            refuse_other_reduction(self._seen(), self.loss_reduction, self._loss_scale.value)

    def _refuse_bad_numbers(self) -> None:
        """Raise if a gradient or statistic is not finite."""
        grads = {p: p.grad for p in self._names if p.grad is not None}
        ess = self._factor()
        if not all_finite(self._numbers(grads), ess):
            refuse_not_finite({"gradient": grads, self._statistic: self._averages.statistics}, self._names, ess)

    def _move(self, harmless: bool) -> None:
        """Move all groups, or none if one would leave the range of its floating-point numbers.

        Args:
            harmless: Whether none can.
        """
        if harmless:
            self._update_groups()
            self._send_moved()
            return
        before = Snapshot(self._sites, self._names, self.state)
        try:
            self._update_groups()
            with self._failing_together():
                before.refuse_values_outside_range()
            self._all_agree(True)
            self._send_moved()
        except BaseException:
            before.restore()
            self._forget()
            raise

    def _update_groups(self) -> None:
        for group in self.param_groups:
            self._update(group) if group["kind"] == "bayesian" else self._update_deterministic(group)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, that of its generator included."""
        state = None if self._generator is None else self._generator.get_state()
        return {**super().state_dict(), "generator": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the next draws are those that would have followed."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        if (state := state_dict.get("generator")) is not None:
            if self._generator is None:
                self._generator = self._sampler.generator = torch.Generator(next(iter(self._sites)).device)
            if state.numel() == self._generator.get_state().numel():
                self._generator.set_state(state.cpu())
            else:
                warnings.warn(
                    "the generator's state is that of another kind of device: draws go on from the present one.",
                    stacklevel=2,
                )
