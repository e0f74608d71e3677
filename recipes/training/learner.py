"""A network in training: its optimiser, its schedules, its loss, and one step of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn

from bayeslayers.distributed import is_distributed, telling_failures
from bayeslayers.distributed.messages import Kind, exchange, shares
from bayeslayers.likelihoods import Categorical, Likelihood
from bayeslayers.optim import TemperatureWarmup
from bayeslayers.optim.base import VariationalOptimizer
from bayeslayers.optim.ranks import statistics_of_norms, weighted_sum

_LEAST_WEIGHT = 1e-12  # of targets none of which counts: a batch of them moves by its prior alone


@dataclass
class Learner:
    """A network in training.

    Attributes:
        model: The network.
        optimizer: Its optimiser; `step(closure)` returns `(loss, output)`, or the loss alone.
        likelihood: Its loss.
        schedulers: Schedules of learning rate and temperature, stepped after every batch.
        forward: The network as it is called in training, compiled, say; None for the network itself.
        precision: "bfloat16" for forward passes under autocast, else "float32".
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    likelihood: Likelihood
    schedulers: Sequence[LambdaLR | TemperatureWarmup] = ()
    forward: Callable[[Tensor], Tensor] | None = None
    precision: str = "float32"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def settings(self) -> dict[str, float]:
        """The learning rate, and the temperature where the optimiser has one."""
        group = self.optimizer.param_groups[0]
        return {key: float(group[key]) for key in ("lr", "temperature") if key in group}

    @property
    def steps_to_posterior(self) -> int:
        """After how many steps the optimiser has a posterior; torch's own leave the means alone at once."""
        return self.optimizer.steps_to_posterior if isinstance(self.optimizer, VariationalOptimizer) else 0

    def finalize(self) -> bool:
        """Let the optimiser write its posterior; return whether it is one of averages, which no batch has seen."""
        if not isinstance(self.optimizer, VariationalOptimizer):
            return False
        self.optimizer.finalize()
        return self.steps_to_posterior > 0

    def refresh_statistics(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Give norms the statistics of these batches under the weights as they are."""
        update_bn(batches, self.model, self.device)

    def step(
        self, x: Tensor, y: Tensor, micro_batch: int | None, refuse: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor | None]:
        """Take one step; return its loss, and the outputs where the optimiser gives them.

        Args:
            x: Inputs `(n, *)`.
            y: Targets.
            micro_batch: Examples per forward pass, whose gradients a step adds up; None for all of them.
            refuse: Called with the loss before the optimiser moves, to raise for one that is not finite.
        """
        if getattr(self.optimizer, "vectorise", False) and getattr(self.optimizer, "num_samples", 1) > 1 and len(x):
            return self._step_at_once(x, y, refuse)
        posterior = self.optimizer if isinstance(self.optimizer, VariationalOptimizer) else None

        def closure() -> tuple[Tensor, Tensor]:
            self.optimizer.zero_grad()
            own = slice(None) if posterior is None else posterior.part(len(x))
            if posterior is not None:
                posterior.loss_weight = self.weight(y[own])
            loss, output = self._backward(x[own], y[own], micro_batch)
            refuse(loss)
            return loss, output

        if posterior is None and is_distributed():
            loss, output = self._step_of_ranks(closure, y)
        elif len(x) == 0:  # of a step whose examples other ranks have
            self.optimizer.step()
            loss, output = x.new_zeros(()), None
        else:
            loss, output = self.optimizer.step(closure)  # pyright: ignore
        self._advance()
        return loss, output

    def _backward(self, x: Tensor, y: Tensor, micro_batch: int | None) -> tuple[Tensor, Tensor]:
        """Go forward and backward; return loss and outputs."""
        call, losses, outputs = self.forward or self.model, [], []
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
        size = micro_batch or len(x)
        weights = [self.weight(targets) or len(targets) for targets in y.split(size)]
        for inputs, targets, share in zip(x.split(size), y.split(size), shares(weights), strict=True):
            with autocast:
                output = call(inputs)
            outputs.append(output.float() if self.precision == "bfloat16" else output)
            losses.append(self.likelihood.loss(outputs[-1], targets) * share)
            losses[-1].backward()
        return torch.stack(losses).sum().detach(), torch.cat(outputs).detach()

    def weight(self, y: Tensor) -> float | None:
        """Return what the loss of targets is divided by, where examples do not count alike; None where they do."""
        likelihood = self.likelihood
        if not isinstance(likelihood, Categorical) or (likelihood.ignore_index is likelihood.class_weights is None):
            return None
        return max(likelihood.weight(y), _LEAST_WEIGHT)

    def _step_of_ranks(self, closure: Callable[[], tuple[Tensor, Tensor]], y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take a step of torch's own optimiser with the mean gradient of all ranks' examples, of which this has some.

        Args:
            closure: Goes backward.
            y: Targets of this rank's examples, which may be none.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        with telling_failures():
            self.optimizer.zero_grad()
            loss, output = closure() if len(y) else (parameters[0].new_zeros(()), None)
            weight = self.weight(y) or len(y)
        rows = exchange(Kind.STEP, weight)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        averaged = [*(p.grad for p in parameters if p.grad is not None), *statistics_of_norms(self.model)]
        weighted_sum(averaged, weight / sum(row.numbers[0] for row in rows))
        self.optimizer.step()
        return loss, output

    def _step_at_once(self, x: Tensor, y: Tensor, refuse: Callable[[Tensor], None]) -> tuple[Tensor, None]:
        """Take a step whose samples run at once: the closure leaves the backward pass to the optimiser."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            return self.likelihood.loss(self.model(x), y)

        loss = torch.as_tensor(self.optimizer.step(closure)).detach()  # pyright: ignore
        refuse(loss)
        self._advance()
        return loss, None

    def _advance(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()

    def bad_weight(self) -> tuple[str, Tensor] | None:
        """Return the name of a weight that is infinite or NaN, and the first such value; None if all are finite."""
        weights = {name: weight.detach() for name, weight in self.model.named_parameters()}
        if torch.stack([weight.sum() for weight in weights.values()]).isfinite().all():  # one pass, one synchronisation
            return None
        found = ((name, weight[~weight.isfinite()]) for name, weight in weights.items())
        return next(((name, values[0]) for name, values in found if len(values)), None)

    def state(self) -> dict[str, Any]:
        """Return the states of network, optimiser and schedules."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Give optimiser and schedules what `state` returned; the network's own state is loaded apart, and checked."""
        self.optimizer.load_state_dict(state["optimizer"])
        for scheduler, own in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(own)
