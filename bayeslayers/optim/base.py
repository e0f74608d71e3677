"""What the variational optimisers share: scoped draws, their running average, and the refusal of bad steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayeslayers.checks import at_least_one, positive
from bayeslayers.sampling import Sampler, Tracker, posterior

LossReduction = Literal["mean", "sum"]


class VariationalOptimizer(torch.optim.Optimizer):
    """Base of the optimisers that draw weights: it averages gradient and curvature over draws.

    After a `sampled()` scope each parameter's `.grad` holds the mean over the draws since the last
    step, so gradient clipping between scope and step works as usual.

    Args:
        model: Model with Bayesian layers. Its other parameters form a group of their own.
        dataset_size: Number of training examples N.
        defaults: Hyperparameters of the groups, `temperature` among them.
        prior_precision: Set as every site's prior precision; None keeps what the layers carry.
        init_precision: Set as every site's precision; None keeps what the layers carry.
        num_samples: Draws per `step(closure)`.
        generator: Source of the draws; torch's default one if None.
        loss_reduction: Whether the loss is the mean or the sum over the batch's examples.
    """

    _step_supports_amp_scaling = True  # see _unscale

    def __init__(
        self,
        model: nn.Module,
        dataset_size: int,
        defaults: dict[str, Any],
        *,
        prior_precision: float | None,
        init_precision: float | None,
        num_samples: int,
        generator: torch.Generator | None,
        loss_reduction: LossReduction,
    ):
        self.model = model
        self.dataset_size = positive("dataset_size", dataset_size)
        self.num_samples = at_least_one("num_samples", num_samples)
        for name, value in (("prior_precision", prior_precision), ("init_precision", init_precision)):
            if value is not None:
                positive(name, value)
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}.")
        self.loss_reduction = loss_reduction
        sites = list(posterior(model))
        self._sites = {site.mean: site for site in sites}
        self._tracker = Tracker({site.name.rpartition(".")[0]: site.module for site in sites})
        if not self._sites:
            raise ValueError("model must have Bayesian layers, got none. Build it from them, as BayesLinear.")
        self._sampler = Sampler(sites, generator)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._inside = False  # an open scope
        self._curvature: dict[nn.Parameter, Tensor] = {}  # mean over the draws since the last step,
        self._curvature_scale = 1.0  # once multiplied by this
        self._draws = 0
        others = [p for p in model.parameters() if p not in self._sites]
        groups = [{"params": list(self._sites), "kind": "bayesian"}, {"params": others, "kind": "deterministic"}]
        super().__init__([group for group in groups if group["params"]], defaults)
        for site in sites:
            if prior_precision is not None:
                site.prior_precision.fill_(prior_precision)
            if init_precision is not None:
                site.precision.fill_(init_precision)

    @contextmanager
    def sampled(self, noise: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Draw weights for the scope, and add its gradient and curvature to the running average.

        Several backward passes inside one scope are parts of one batch (accumulation): with a mean
        loss, divide each by their number. Several scopes before a step are draws, and averaged here.

        Args:
            noise: Standard normal values by parameter name, in place of drawn ones.
        """
        if self._inside:
            raise RuntimeError("sampled() must not be nested in itself; leave one scope before the next.")
        earlier = {p: p.grad for p in self._names}
        if all(grad is None for grad in earlier.values()):  # cleared past the optimizer: no draw to average with
            self._curvature, self._draws = {}, 0
        self._restore(dict.fromkeys(self._names))
        try:
            with self._sampler.draw(noise), self._tracker.track():
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
        """Fold the scope's gradient and curvature into the means over draws."""
        examples = self._tracker.examples
        if examples == 0:  # nothing went backward: no draw to count
            self._restore(earlier)
            return
        self._draws += 1
        # What makes sums over examples, in the units of the loss, means over examples.
        scale = 1 / examples if self.loss_reduction == "sum" else float(examples)
        if self._draws == 1:
            self._curvature_scale = scale
        for parameter, name in self._names.items():
            grad, leaf = parameter.grad, self._tracker.leaves.get(name)
            squares = None if leaf is None else leaf.grad
            if parameter in self._sites and grad is not None and squares is None:
                raise RuntimeError(
                    f"parameter '{name}' must get its gradient through its own layer, got it past the layer. "
                    "Read it by calling the layer, or use an ordinary parameter."
                )
            if grad is not None and self.loss_reduction == "sum":
                grad = grad / examples
            if squares is not None and scale != self._curvature_scale:  # a draw on a batch of another size
                squares = squares * (scale / self._curvature_scale)
            before = earlier[parameter] if self._draws > 1 else None
            parameter.grad = self._average(before, grad)
            if (curvature := self._average(self._curvature.get(parameter), squares)) is not None:
                self._curvature[parameter] = curvature

    def _average(self, mean: Tensor | None, new: Tensor | None) -> Tensor | None:
        """Return the mean over `self._draws` draws, from that of all but the last and the last."""
        if self._draws == 1 or (mean is None and new is None):
            return new
        if mean is None:
            return new / self._draws  # pyright: ignore[reportOptionalOperand]
        return torch.lerp(mean, torch.zeros_like(mean) if new is None else new, 1 / self._draws)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; inside a scope those of this draw alone, outside one those of every draw."""
        super().zero_grad(set_to_none)
        if self._inside:
            self._tracker.clear()
        else:
            self._curvature, self._draws = {}, 0

    def _run(self, closure: Callable[[], Any]) -> tuple[Tensor, Any]:
        """Run the closure in `num_samples` scopes; return the means of loss and output."""
        earlier = {p: p.grad for p in self._names}
        self._curvature, self._draws = {}, 0
        try:
            results = [self._run_once(closure) for _ in range(self.num_samples)]
        except BaseException:
            self._restore(earlier)
            self._curvature, self._draws = {}, 0
            raise
        losses, outputs = [loss for loss, _ in results], [output for _, output in results]
        averages = isinstance(outputs[0], Tensor) and len(outputs) > 1
        return torch.stack(losses).mean(), torch.stack(outputs).mean(0) if averages else outputs[-1]

    def _run_once(self, closure: Callable[[], Any]) -> tuple[Tensor, Any]:
        with torch.enable_grad(), self.sampled():
            result = closure()
            loss, output = result if isinstance(result, tuple) else (result, None)
            loss = torch.as_tensor(loss).detach()
            if not loss.isfinite().all():
                raise FloatingPointError(
                    f"the loss must be finite, got {loss.tolist()}: the step is refused, the posterior is as it was. "
                    "Lower lr, or look at the batch."
                )
        return loss, output.detach() if isinstance(output, Tensor) else output

    @staticmethod
    def _restore(grads: Mapping[nn.Parameter, Tensor | None]) -> None:
        for parameter, grad in grads.items():
            parameter.grad = grad

    def _unscale(self) -> bool:
        """Take the scale of a `torch.amp.GradScaler` out of gradient and curvature; return whether to go on.

        The scaler hands an optimizer that supports it `grad_scale` and `found_inf` for the time of its step.
        """
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return True
        if found_inf:  # the scaler lowers its scale, and the step is left out
            self._curvature, self._draws = {}, 0
            return False
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            raise RuntimeError(
                "gradients must reach step() as GradScaler scaled them, got them unscaled: the curvature, their "
                "square, would keep the scale. Leave scaler.unscale_(optimizer) out."
            )
        for parameter in self._names:
            if parameter.grad is not None:
                parameter.grad /= scale
        self._curvature_scale /= float(scale) ** 2
        return True

    def _refuse_bad_step(self) -> None:
        """Raise if no draw was made, or if a gradient or curvature is not finite; nothing is changed by then."""
        if self._draws == 0:
            raise RuntimeError(
                "step() must follow a backward pass under drawn weights, got none since the last step. Pass a "
                "closure, or call loss.backward() inside `with optimizer.sampled():`."
            )
        grads = {p: p.grad for p in self._names if p.grad is not None}
        tensors = [*grads.values(), *self._curvature.values()]
        # What the step adds to the precision is this much larger, and must be finite too.
        ess = self.dataset_size / min(group["temperature"] for group in self.param_groups)
        ess *= max(1.0, self._curvature_scale)
        # A sum is finite only if every entry is: one reduction each, one look at the result.
        if (torch.stack([t.sum() for t in tensors]) * ess).isfinite().all():
            return
        for quantity, values in (("gradient", grads), ("curvature", self._curvature)):
            for parameter, tensor in values.items():
                if bad := int((~(tensor * ess).isfinite()).sum()):
                    self._curvature, self._draws = {}, 0
                    raise FloatingPointError(
                        f"the {quantity} of '{self._names[parameter]}' must be finite, got {bad} of "
                        f"{tensor.numel()} entries that are not: the step is refused, the posterior is as it was. "
                        "Lower lr, or look at the batch."
                    )

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, that of its generator included."""
        generator = self._sampler.generator
        state = None if generator is None else generator.get_state()
        return {**super().state_dict(), "generator": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the next draws are those that would have followed."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        if (state := state_dict.get("generator")) is not None:
            self._sampler.generator = self._sampler.generator or torch.Generator(next(iter(self._sites)).device)
            self._sampler.generator.set_state(state.cpu())


def momentum_average(state: dict[str, Any], grad: Tensor, beta1: float) -> Tensor:
    """Return the bias-corrected exponential average of gradients, kept in `state["momentum"]`.

    With the weight (1 - beta1) / (1 - beta1^t) for the newest gradient the average needs no
    correction afterwards: it is that of Adam (Kingma & Ba 2015), written as a recursion.
    """
    if beta1 == 0:
        return grad
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(grad)
    return state["momentum"].lerp_(grad, (1 - beta1) / (1 - beta1 ** state["step"]))


def adam_update(parameters: Iterable[nn.Parameter], group: dict[str, Any], state: dict[Any, Any]) -> None:
    """Train the deterministic parameters of one group by Adam (Kingma & Ba 2015), without weight decay."""
    for parameter in parameters:
        if parameter.grad is None:
            continue
        own = state[parameter]
        own["step"] = own.get("step", 0) + 1
        if "second_moment" not in own:
            own["second_moment"] = torch.zeros_like(parameter)
        second = own["second_moment"]
        second.lerp_(parameter.grad.square(), 1 - group["beta2"])
        scale = (second / (1 - group["beta2"] ** own["step"])).sqrt_().add_(1e-8)
        direction = momentum_average(own, parameter.grad, group["beta1"])
        parameter.addcdiv_(direction, scale, value=-group["lr"])
