"""Costs as ratios, measured side by side in one process: medians of interleaved runs."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import bayeslayers as bl
import zoo
from bayeslayers.checks import at_least_one, non_negative
from bayeslayers.storage.weight_file import WEIGHTS
from recipes.reports.step_networks import step_network
from recipes.training.methods import make_optimizer, method_of
from recipes.training.plain_yaml import read_yaml

TURN = 10  # steps
LR = 1e-3  # whatever the method: it costs no time, and lets none diverge


@dataclass(frozen=True)
class Row:
    """One measurement: the median step of an optimiser, and its ratio to that of Adam on the deterministic network."""

    model: str
    batch: int
    optimizer: str
    median_ms: float
    ratio_to_adam: float


def benchmark_step(
    rounds: int = 100,
    seed: int = 0,
    optimizers: Sequence[str] = ("vogn",),
    models: Sequence[str] = ("mlp", "lenet5"),
    cpu: bool = False,
    num_samples: int = 1,
    turn: int = TURN,
    warm_up: int = 0,
) -> list[Row]:
    """Time a training step of optimisers beside one of Adam (foreach) on the deterministic network.

    They take turns of some steps each, so that what is done at every tenth step alone has its share.

    Args:
        rounds: Steps of each, after a tenth as many to warm up.
        seed: Of weights and data.
        optimizers: Names of `recipes.training.methods`, each with its defaults but for the learning rate, and for
            options behind the name: "kfac,inverse_every=50".
        models: Names of `step_networks.NETWORKS`, or of classifiers of the zoo.
        cpu: Measure the time of the process in place of that of the clock, which other processes do not disturb.
        num_samples: Samples of a step, of methods that have any.
        turn: Steps of a turn, `rounds` at most.
        warm_up: Further steps before, as of K-FAC, whose first inverses follow closely on each other.

    Raises:
        ValueError: If a model or an optimizer is not known, a model is no classifier, or a number is too small.
    """
    at_least_one("rounds", rounds)
    at_least_one("num_samples", num_samples)
    non_negative("warm_up", warm_up)
    rows, turn = [], min(rounds, at_least_one("turn", turn))
    for name in models:
        torch.manual_seed(seed)
        model, x, y = step_network(name)
        turns = {"adam": _turn(*_trained(model, "adam", foreach=True), x, y, turn, warm_up)}
        for optimizer in optimizers:
            own = _configured(optimizer)
            if "num_samples" in method_of(own).options:
                own.setdefault("num_samples", num_samples)
            turns[optimizer] = _turn(*_trained(model, **own), x, y, turn, warm_up)
        medians = interleaved_medians(turns, rounds // turn, time.process_time if cpu else time.perf_counter)
        rows += [
            Row(name, len(x), optimizer, round(1e3 * median / turn, 3), round(median / medians["adam"], 3))
            for optimizer, median in medians.items()
        ]
    return rows


def _turn(
    net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, turn: int, warm_up: int
) -> Callable[[], object]:
    """Return an action of some training steps, after others."""
    steps(net, optimizer, x, y, warm_up)()
    return steps(net, optimizer, x, y, turn)


def _configured(text: str) -> dict[str, Any]:
    """Return a configuration of an optimizer, from its name and its options, as "kfac,inverse_every=50"."""
    name, *options = text.split(",")
    pairs = [option.partition("=") for option in options]
    return {"name": name, **{key: read_yaml(value, text) for key, _, value in pairs}}


def _trained(model: nn.Module, name: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a copy of the network with its optimizer, an ordinary network for one of torch."""
    net = bl.to_deterministic(model) if method_of({"name": name}).point else copy.deepcopy(model)
    return net, make_optimizer({"name": name, "lr": LR, **options}, net, 60_000, seed=0)


@dataclass(frozen=True)
class LoadRow:
    """One measurement: a posterior loaded to predict one image, and the ratio of its median time to plain torch's."""

    posterior: str
    num_samples: int
    median_ms: float
    plain_ms: float
    ratio_to_plain: float


def benchmark_load(rounds: int = 100) -> list[LoadRow]:
    """Time `zoo.load` and `predict` for one image beside plain torch that does what of it is needed.

    Plain torch builds the same network of torch.nn layers, reads the same file, and averages as many
    draws made into the network's own weights. It checks nothing and gives the mean alone.

    Args:
        rounds: Interleaved runs of each, after a tenth as many to warm up.
    """
    at_least_one("rounds", rounds)
    x, rows = torch.rand(1, 1, 28, 28), []
    for name, build in {"lenet5-mnist": _plain_lenet5, "mlp-mnist": _plain_mlp}.items():
        path = zoo.resolve(name) / WEIGHTS
        for num_samples in (1, 64):
            medians = interleaved_medians(
                {
                    "plain": partial(_plain_prediction, build, path, x, num_samples),
                    "ours": partial(_prediction, name, x, num_samples),
                },
                rounds,
            )
            ratio = round(medians["ours"] / medians["plain"], 3)
            rows.append(
                LoadRow(name, num_samples, round(1e3 * medians["ours"], 3), round(1e3 * medians["plain"], 3), ratio)
            )
    return rows


def _prediction(name: str, x: Tensor, num_samples: int) -> Tensor:
    return bl.predict(zoo.load(name), x, num_samples).mean


@torch.no_grad()
def _plain_prediction(build: Callable[[], nn.Module], path: Path, x: Tensor, num_samples: int) -> Tensor:
    net, tensors = build().eval(), load_file(path)
    net.load_state_dict({name: tensors[name] for name, _ in net.named_parameters()})
    deviations = {name: tensors[f"{name}_precision"].rsqrt() for name, _ in net.named_parameters()}
    x = (x - tensors["normalise.mean"]) / tensors["normalise.std"]
    probs = torch.zeros(())
    for _ in range(num_samples):
        for name, parameter in net.named_parameters():
            torch.addcmul(tensors[name], parameter.normal_(), deviations[name], out=parameter)
        probs = probs + net(x).softmax(1)
    return probs / num_samples


def peak_memory(action: Callable[[], object]) -> int:
    """Return the most bytes that the process held while it ran an action; without Linux, at any time so far."""
    import resource

    try:
        Path("/proc/self/clear_refs").write_text("5")  # brings the mark to what is held now
    except OSError:
        action()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    action()
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _plain_lenet5() -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(1, 6, 5, padding=2),
        act1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5),
        act2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        linear1=nn.Linear(400, 120),
        act3=nn.ReLU(),
        linear2=nn.Linear(120, 84),
        act4=nn.ReLU(),
        output=nn.Linear(84, 10),
    )
    return nn.Sequential(layers)


def _plain_mlp() -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        flatten=nn.Flatten(),
        hidden1=nn.Linear(784, 400),
        act1=nn.ReLU(),
        hidden2=nn.Linear(400, 400),
        act2=nn.ReLU(),
        output=nn.Linear(400, 10),
    )
    return nn.Sequential(layers)


def interleaved_medians(
    actions: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median time of each action in seconds, the actions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + rounds // 10):
        for name, action in actions.items():
            began = clock()
            action()
            if number >= rounds // 10:
                times[name].append(clock() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, number: int
) -> Callable[[], object]:
    """Return an action of some training steps of a classifier.

    Args:
        model: The network.
        optimizer: Its optimiser.
        x: Inputs of the batch.
        y: Its labels.
        number: Steps of the action.
    """

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def run() -> None:
        for _ in range(number):
            optimizer.step(closure)  # pyright: ignore[reportCallIssue, reportArgumentType]

    return run
