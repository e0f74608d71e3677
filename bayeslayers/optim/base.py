"""What the variational optimisers share: scoped draws, and steps that refuse bad numbers."""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one, positive
from bayeslayers.curvature.counts import Reduction
from bayeslayers.curvature.elements import Elements, LossFunctions, refuse_other_reduction
from bayeslayers.method import predict_by_samples
from bayeslayers.optim.adam import adam_update
from bayeslayers.optim.averages import Averages, Recorded
from bayeslayers.optim.groups import PosteriorGroups, Rules
from bayeslayers.optim.guard import Snapshot, adam_ratio, is_harmless, magnitudes
from bayeslayers.optim.ranks import average_over_ranks, copy_from_first_rank, process_group
from bayeslayers.sampling import Site
from bayeslayers.sampling.sharing import in_use


class VariationalOptimizer(PosteriorGroups):
    """Base of the optimisers of a posterior: it averages gradients and statistics over draws of the weights.

    After a `sampled()` scope each parameter's `.grad` holds the mean over the draws since the last
    step, so gradient clipping between scope and step works as usual.

    Args:
        model: Model with Bayesian layers, on its device already.
        dataset_size: Number of training examples N.
        rules: The check of each hyperparameter of a group.
        defaults: Their values, `lr` and `beta1` among them.
        groups: This and the following as for `PosteriorGroups`.
        deterministic_lr: Learning rate of deterministic parameters.
        prior_precision: Prior precision of every site.
        init_precision: Precision of every site.
        num_samples: Draws per `step(closure)`.
        generator: Source of the draws; torch's default one if None.
        sync: Average over the ranks of the default process group before each step.
        elements_per_example: Elements that an example's loss is a mean over; None for those that are seen.
    """

    _drawing_twin: ClassVar[str | None] = None  # the method that draws weights, for one that computes at the mean
    _keeps_roots: ClassVar[bool] = False  # moves matrix-variate posteriors as such
    _step_supports_amp_scaling = True  # see _unscale
    _statistic: ClassVar[str] = "curvature"  # what messages call the statistics
    _loss_power: int = 2  # the power of the loss they are proportional to
    loss_reduction: Reduction = "mean"  # what the loss is of those of the examples

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        rules: Rules,
        defaults: Mapping[str, Any],
        *,
        groups: Sequence[Mapping[str, Any]] | None = None,
        deterministic_lr: float | None = None,
        prior_precision: float | None = None,
        init_precision: float | None = None,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
        sync: bool = False,
        elements_per_example: float | None = None,
    ):
        if elements_per_example is not None:
            positive("elements_per_example", elements_per_example)
        self.elements_per_example = elements_per_example
        self.num_samples = at_least_one("num_samples", num_samples)
        self.sync = sync
        self._inside = False  # an open scope
        self._losses = LossFunctions()
        self._forget()
        if sync:
            process_group()  # raises before the model changes
        super().__init__(
            model,
            dataset_size,
            rules,
            defaults,
            groups=groups,
            deterministic_lr=deterministic_lr,
            prior_precision=prior_precision,
            init_precision=init_precision,
            generator=generator,
        )
        if sync:
            copy_from_first_rank(model.state_dict().values())

    @abc.abstractmethod
    def _scope(self, noise: Mapping[str, Tensor] | None) -> AbstractContextManager[Any]:
        """Return the scope of one draw, in which what the method needs is recorded."""

    @abc.abstractmethod
    def _record(self) -> Recorded | None:
        """Return what the last scope left, or None if nothing went backward in it."""

    @abc.abstractmethod
    def _update(self, group: dict[str, Any]) -> None:
        """Move the posterior of one group's uncertain parameters by the averages over draws."""

    def _draw(self, noise: Mapping[str, Tensor] | None) -> AbstractContextManager[None]:
        """Return the scope of a draw of the weights; of the means, for a method that draws none."""
        if self._drawing_twin is None:
            return self._sampler.draw(noise)
        if noise is not None:
            raise ValueError(f"noise must be None without draws, got values for weights. Use {self._drawing_twin}.")
        return nullcontext()

    @staticmethod
    def _past_its_layer(site: Site) -> RuntimeError:
        """Return the error for a gradient without a statistic."""
        return RuntimeError(
            f"parameter '{site.name}' must get its gradient through its own layer, got it past the layer. "
            "Read it by calling the layer, or use an ordinary parameter."
        )

    def _clear_record(self) -> None:
        """Drop what the open scope has recorded so far."""

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
        if not self._keeps_roots:
            self._drop_roots()
        earlier = {p: p.grad for p in self._names}
        if all(grad is None for grad in earlier.values()):  # cleared past the optimizer: no draw to average with
            self._forget()
        self._restore(dict.fromkeys(self._names))
        self._losses.clear()
        try:
            with in_use(self.model, trains=True), scope(), self._losses:
                self._inside = True
                yield
            self._collect(earlier)
        except BaseException:
            self._restore(earlier)
            raise
        finally:
            self._inside = False

    @torch.no_grad()
    def _collect(self, earlier: Mapping[nn.Parameter, Tensor | None]) -> None:
        """Fold the scope's gradients and statistics into the means over draws."""
        recorded = self._record()
        if recorded is None:
            self._restore(earlier)
        else:
            self._averages.add(recorded, earlier)

    def _forget(self) -> None:
        """Drop the draws since the last step."""
        self._averages = Averages()
        self._seen: Elements | None = None
        self._loss_scale = 1.0

    def _elements(self, examples: int) -> Elements:
        """Return what the losses of the last scope are means over."""
        self._seen = self._losses.elements(examples, self.elements_per_example)
        return self._seen

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; inside a scope those of this draw alone, outside one those of every draw."""
        super().zero_grad(set_to_none)
        if self._inside:
            self._losses.clear()
            self._clear_record()
        else:
            self._forget()

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
            RuntimeError: If there was no draw since the last step.
        """
        with in_use(self.model, trains=True):
            return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss, output = (None, None) if closure is None else self._run(closure)
        if not self._unscale():
            return None
        if self.sync:
            self._average_over_ranks()
        self._refuse_bad_step()
        self._move()
        predict_by_samples(self.model)
        self._forget()
        return loss if output is None else (loss, output)

    def _move(self) -> None:
        """Move all groups, or none if one would leave the range of its floating-point numbers."""
        harmless = all(is_harmless(self._reach(group), group["params"]) for group in self.param_groups)
        if harmless:
            return self._update_groups()
        before = Snapshot(self._sites, self._names, self.state)
        try:
            self._update_groups()
            before.refuse_values_outside_range()
        except BaseException:
            before.restore()
            self._forget()
            raise

    def _update_groups(self) -> None:
        for group in self.param_groups:
            if group["kind"] == "bayesian":
                self._update(group)
            else:
                adam_update(group["params"], group, self.state)

    def _reach(self, group: dict[str, Any]) -> float:
        """Return a bound on what the coming step makes of a group; infinite if none is at hand."""
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return 0.0
        if group["kind"] == "bayesian":
            return self._posterior_reach(group, parameters)
        return magnitudes(parameters)[0] + group["lr"] * adam_ratio(group["beta1"], group["beta2"])

    def _posterior_reach(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> float:
        """Return the bound for uncertain parameters with gradients."""
        return math.inf

    def _momenta(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Return the gradients of parameters, and what they are averaged with."""
        averages = [self.state[p]["momentum"] for p in parameters if "momentum" in self.state.get(p, ())]
        return [*(p.grad for p in parameters if p.grad is not None), *averages]

    def _run(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        """Run the closure under all draws; return the means of loss and output.

        A closure that does nothing and returns None, as Lightning passes one in manual optimisation,
        stands for no closure.
        """
        earlier, averages = {p: p.grad for p in self._names}, self._averages
        self._forget()
        try:
            loss, output = self._run_draws(closure)
        except BaseException:
            self._restore(earlier)
            self._averages = averages
            raise
        if loss is None:
            self._averages = averages
        return loss, output

    def _run_draws(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        """Run the closure in `num_samples` scopes, one after the other; return the means of loss and output."""
        results = [first := self._run_once(closure)]
        if first[0] is None:
            return first
        results += [self._run_once(closure) for _ in range(self.num_samples - 1)]
        losses, outputs = [loss for loss, _ in results], [output for _, output in results]
        averages = isinstance(outputs[0], Tensor) and len(outputs) > 1
        return torch.stack(losses).mean(), torch.stack(outputs).mean(0) if averages else outputs[-1]

    def _run_once(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        with torch.enable_grad(), self.sampled():
            result = closure()
            if result is None and all(p.grad is None for p in self._names):
                return None, None
            loss, output = result if isinstance(result, tuple) else (result, None)
            if loss is None:
                raise TypeError("closure must return the loss, or (loss, output), got None.")
            loss = torch.as_tensor(loss).detach()
            self._refuse_bad_loss(loss)
        return loss, output.detach() if isinstance(output, Tensor) else output

    def _refuse_bad_loss(self, loss: Tensor) -> None:
        # Under sync the ranks refuse a step together, once the gradients have met.
        if not self.sync and not loss.isfinite().all():
            raise FloatingPointError(
                f"the loss must be finite, got {loss.tolist()}: the step is refused, the posterior is as it was. "
                "Lower lr, or look at the batch."
            )

    @staticmethod
    def _restore(grads: Mapping[nn.Parameter, Tensor | None]) -> None:
        for parameter, grad in grads.items():
            parameter.grad = grad

    def unscale_(self, scaler: torch.amp.GradScaler) -> None:
        """Take a gradient scaler's factor out of gradients and statistics, to clip gradients before the step.

        It stands for `scaler.unscale_(optimizer)`, which cannot know of the statistics.
        """
        if not scaler.is_enabled():
            return
        scaler.unscale_(self)
        self._rescale(scaler.get_scale())
        self._unscaled = True

    _unscaled = False

    def _unscale(self) -> bool:
        """Take the scale of a `torch.amp.GradScaler` out of gradients and statistics; return whether to go on.

        The scaler hands an optimizer that supports it `grad_scale` and `found_inf` for the time of its step.
        """
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return True
        if self.sync:
            raise RuntimeError(
                "sync must be off under a GradScaler, whose ranks would leave out different steps, got it on."
            )
        unscaled, self._unscaled = self._unscaled, False
        if found_inf:  # the scaler lowers its scale, and the step is left out
            self._forget()
            return False
        scale = getattr(self, "grad_scale", None)
        if scale is None and not unscaled:
            raise RuntimeError(
                f"gradients must be unscaled by optimizer.unscale_(scaler), got scaler.unscale_(optimizer): the "
                f"{self._statistic} would keep the scale."
            )
        if scale is not None:
            for parameter in self._names:
                if parameter.grad is not None:
                    parameter.grad /= scale
            self._rescale(float(scale))
        return True

    def _rescale(self, loss_scale: float) -> None:
        """Take the loss scale out of the statistics."""
        self._loss_scale = loss_scale
        self._averages.scale /= loss_scale**self._loss_power

    def _average_over_ranks(self) -> None:
        """Replace gradients and statistics by their means over the ranks."""
        grads = {p: p.grad for p in self._names if p.grad is not None}
        self._averages.apply_scale()
        average_over_ranks([*grads.values(), *self._averages.statistics.values()])

    def _refuse_bad_step(self) -> None:
        """Raise if no draw was made, or if a gradient or statistic is not finite; nothing is changed by then."""
        if self._averages.draws == 0:
            raise RuntimeError(
                "step() must follow a backward pass under drawn weights, got none since the last step. Pass a "
                "closure, or call loss.backward() inside `with optimizer.sampled():`."
            )
        if self._seen is not None:
            refuse_other_reduction(self._seen, self.loss_reduction, self._loss_scale)
        grads = {p: p.grad for p in self._names if p.grad is not None}
        # What the step adds to the precision is this much larger, and must be finite too.
        statistics = self._averages.statistics
        ess = max(self._ess(group) for group in self.param_groups) * max(1.0, self._averages.scale)
        tensors = [*grads.values(), *statistics.values()]
        # A sum is finite only if every entry is: one reduction each, one look at the result.
        if (torch.stack([t.sum() for t in tensors]) * ess).isfinite().all():
            return
        for quantity, values in (("gradient", grads), (self._statistic, statistics)):
            for key, tensor in values.items():
                if bad := int((~(tensor * ess).isfinite()).sum()):
                    self._forget()
                    raise FloatingPointError(
                        f"the {quantity} of '{self._names.get(key, key)}' must be finite, got {bad} of "
                        f"{tensor.numel()} entries that are not: the step is refused, the posterior is as it was. "
                        "Lower lr, or look at the batch."
                    )

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
