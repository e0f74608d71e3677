"""One network of another library, tried: is it converted, does it train, is every tensor moved, is it saved and loaded?

As a program, `python -m recipes.reports.convert_check`, it reads names, one a line, and prints a row as JSON for each.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import bayeslayers as bl
from bayeslayers.display import one_line
from bayeslayers.inputs import Inputs, leaves
from recipes.reports.convert_networks import Trial, trial

STEP = 1e3  # of VOGN's means: some networks scale their blocks by 1e-6, and float32 would round small steps away
_OPEN = {"dropout", "drop", "p", "drop_prob", "dropout_p", "attention_dropout", "stochastic_depth_prob"}


@dataclass
class ConvertRow:
    """What became of one network; a column is None where an earlier failure left it open.

    Attributes:
        network: Its name, `LIBRARY:NETWORK`.
        parameters: How many it has.
        converts: `to_bayesian` takes it.
        outputs_equal: Converted, it computes the same.
        coverage: Share of its parameters that are Bayesian.
        vogn_step: VOGN takes a step.
        ivon_step: IVON takes a step on the ordinary network.
        all_move: Both move every tensor that the loss reaches.
        save_load: A saved posterior loads with the same tensors and outputs.
        epistemic: Epistemic uncertainty is > 0 for every example; None for a network whose outputs are boxes.
        reason: Of each failure, and of parameters that are not Bayesian.
        seconds: Time of all of it.
    """

    network: str
    parameters: int = 0
    converts: bool | None = None
    outputs_equal: bool | None = None
    coverage: float | None = None
    vogn_step: bool | None = None
    ivon_step: bool | None = None
    all_move: bool | None = None
    save_load: bool | None = None
    epistemic: bool | None = None
    reason: str = ""
    seconds: float = 0.0


class _Checks:
    """The checks of one network, which leave their results in its row."""

    def __init__(self, name: str):
        self.row = ConvertRow(name)
        self.reasons: list[str] = []
        self.tried: Trial | None = None

    def attempt(self, column: str, check: Callable[[], bool | None]) -> bool:
        """Run a check; an exception is a failure with a reason."""
        try:
            found = check()
        except Exception as error:  # whatever a network raises
            found = False
            self.reasons.append(f"{column}: {type(error).__name__}: {one_line(error)}")
        setattr(self.row, column, found)
        return bool(found)

    def run(self) -> ConvertRow:
        began = time.perf_counter()
        if self.attempt("converts", self._convert):
            self.attempt("outputs_equal", self._outputs_equal)
            moved = [self._step("vogn_step", self.net, _vogn), self._step("ivon_step", self.ordinary, _ivon)]
            if None not in moved:
                self.row.all_move = all(moved)
            self.attempt("save_load", self._save_load)
            self.attempt("epistemic", self._epistemic)
        self.row.reason = "; ".join(self.reasons)
        self.row.seconds = round(time.perf_counter() - began, 1)
        return self.row

    def _convert(self) -> bool:
        self.tried = tried = trial(self.row.network)
        self.ordinary = without_dropout(tried.network)
        self.row.parameters = sum(p.numel() for p in self.ordinary.parameters())
        self.net, report = bl.to_bayesian(self.ordinary)
        self.row.coverage = round(report.coverage, 5)
        if report.coverage < 0.99:
            reasons = {entry.reason for entry in report.entries if entry.status != "converted"}
            self.reasons.append(f"coverage: {', '.join(sorted(reasons))}")
        return True

    def _outputs_equal(self) -> bool:
        one, two = (self._call(copy.deepcopy(net).eval()) for net in (self.ordinary, self.net))
        pairs = list(zip(leaves(_plain(one)), leaves(_plain(two)), strict=True))
        for left, right in pairs:
            assert_close(left, right)
        return len(pairs) > 0

    def _call(self, net: nn.Module) -> Any:
        assert self.tried is not None
        with torch.no_grad():
            return net(*self.tried.args, **self.tried.kwargs)

    def _loss(self, net: nn.Module) -> Tensor:
        assert self.tried is not None
        torch.manual_seed(1)  # of what a network draws by itself
        return self.tried.loss(net(*self.tried.args, **self.tried.kwargs))

    def _step(self, column: str, net: nn.Module, method: Callable[..., Any]) -> bool | None:
        """Take a step on a copy of a network, and return whether it moves every tensor; None if there is no step."""
        tried = self.tried
        assert tried is not None
        still: list[str] = []

        def check() -> bool:
            reached, stepped = self._reached(copy.deepcopy(net).train()), copy.deepcopy(net).train()
            optimizer = method(stepped, tried.elements)
            before = {name: p.detach().clone() for name, p in stepped.named_parameters()}
            precisions = {site.name: site.precision.clone() for site in bl.posterior(stepped)}
            with optimizer.sampled():
                self._loss(stepped).backward()
            optimizer.step()
            after = dict(stepped.named_parameters())
            still.extend(name for name in reached if torch.equal(before[name], after[name]))
            still.extend(
                f"{s.name}_precision"
                for s in bl.posterior(stepped)
                if s.name in reached and torch.equal(precisions[s.name], s.precision)
            )
            return all(bool(p.isfinite().all()) for p in after.values())

        if not self.attempt(column, check):
            return None
        if still:
            self.reasons.append(f"all_move: {column} leaves {len(still)} tensors ({', '.join(still[:3])}) as they are")
        return not still

    def _reached(self, net: nn.Module) -> list[str]:
        """Return the names, in the network's order, of the tensors in which a backward pass leaves a gradient."""
        self._loss(net).backward()
        return [name for name, p in net.named_parameters() if p.grad is not None and bool(p.grad.any())]

    def _save_load(self) -> bool:
        for site in bl.posterior(self.net):
            site.precision.mul_(1.5)
        fresh = bl.to_bayesian(self.ordinary)[0]
        with tempfile.TemporaryDirectory() as folder:
            bl.save_posterior(self.net, f"{folder}/posterior")
            bl.load_posterior(f"{folder}/posterior", fresh)
        expected = self.net.state_dict()
        assert_close(dict(fresh.state_dict()), dict(expected), rtol=0, atol=0)
        return True

    def _epistemic(self) -> bool | None:
        assert self.tried is not None
        if not self.tried.predicts:
            return None
        batch = Inputs(*self.tried.args, **self.tried.kwargs)
        prediction = bl.predict(
            self.net.eval(), batch, num_samples=2, likelihood=bl.Gaussian(1.0), output=self.tried.output
        )
        return bool((prediction.epistemic.flatten(1).sum(1) > 0).all())


def check(name: str) -> ConvertRow:
    """Try a network of `convert_names.NETWORKS`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _Checks(name).run()


def _vogn(net: nn.Module, elements: float | None) -> bl.VOGN:
    return bl.VOGN(net, dataset_size=1000, lr=STEP, precision_lr=0.1, elements_per_example=elements)


def _ivon(net: nn.Module, elements: float | None) -> bl.IVON:
    return bl.IVON(net, dataset_size=1000, lr=STEP, hess_init=1e-3)


def without_dropout(net: nn.Module) -> nn.Module:
    """Turn off dropout of all kinds, in place, so that two calls compute the same."""
    for module in net.modules():
        for name in _OPEN:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return net


def _plain(returned: Any) -> Any:
    """Return what a network returns as nested lists and mappings of tensors."""
    return dict(returned) if hasattr(returned, "keys") else returned


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(asdict(check(line.strip()))), flush=True)
