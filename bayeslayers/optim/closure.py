"""The draws of `step(closure)`: the closure runs under each, and the losses are checked."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from bayeslayers.distributed.messages import shares
from bayeslayers.optim.averages import kept_gradients, set_gradients
from bayeslayers.optim.draws import AveragedDraws


class ClosureDraws(AveragedDraws, abc.ABC):
    """Base of optimisers whose steps may be given a closure. It is built as `AveragedDraws`."""

    _reads_once: ClassVar[bool] = False  # what decides a step is read from the device together, see `_foresee`
    _unread: tuple[Tensor, Callable[[], list[float]]] | None = None  # a loss that has not been checked, and its values

    def _foresee(self) -> None:
        """Compute what decides whether the coming step is harmless, to be read together with the loss."""

    def _run(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        """Run the closure under all draws; return the means of loss and output.

        A closure that does nothing and returns None, as Lightning passes one in manual optimisation,
        stands for no closure.
        """
        earlier, averages = kept_gradients(self._names, self._spent), self._averages
        self._forget()
        try:
            try:
                loss, output = self._run_groups(closure)
                if not self.sync:
                    self._foresee()
            finally:  # a loss that is not finite is what to name, whatever it has led to
                self._refuse_bad_loss()
        except BaseException:
            self._forget()
            set_gradients(self._names, earlier)
            self._averages = averages
            raise
        if loss is None:
            set_gradients(self._names, earlier)
            self._averages = averages
        return loss, output

    def _run_groups(self, closure: Callable[[], Any]) -> tuple[Any, Any]:
        """Run the draws of this rank's sample groups; return the mean loss, and the outputs of all their parts."""
        results, weights = [], []
        try:
            for group in self._groups:
                self._group = group
                results.append(self._run_draws(closure))
                weights.append(float(self._part_weight))
        finally:
            self._group = self._groups[0]
        if len(results) == 1 or results[0][0] is None:
            return results[0]
        outputs = [output for _, output in results]
        whole = torch.cat(outputs) if isinstance(outputs[0], Tensor) else outputs[-1]
        losses = [loss * share for (loss, _), share in zip(results, shares(weights), strict=True)]
        return torch.stack(losses).sum(), whole

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
            self._note_loss(loss)
        return loss, output.detach() if isinstance(output, Tensor) else output

    def _note_loss(self, loss: Tensor) -> None:
        """Refuse a loss that is not finite: at once, or before the step where it is that of the only draw."""
        self._unread = loss, self._readings.later([loss.reshape(-1)])
        if not self._reads_once or self.num_samples > 1 or len(self._groups) > 1:
            self._refuse_bad_loss()

    def _refuse_bad_loss(self) -> None:
        unread, self._unread = self._unread, None
        if unread is not None and not all(map(math.isfinite, unread[1]())):
            raise FloatingPointError(
                f"the loss must be finite, got {unread[0].tolist()}. The step is rejected, and the posterior is "
                "unchanged. Lower lr, or look at the batch."
            )
