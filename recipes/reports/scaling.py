"""What several processes cost: a model of the time of a step, whose terms are measured, beside steps that are measured.

    step(P) = compute + update + message + reduction(P)
    reduction(P) = latency (P - 1) + 2 (P - 1) / P bytes / bandwidth

Compute and update are those of P processes that run at the same time without a word to each other, so that they share
the machine's cores as those of the whole step do. Latency and bandwidth are fitted to reductions of several sizes.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bayeslayers.checks import at_least_one


@dataclass(frozen=True)
class ScalingRow:
    """One number of processes: the terms of the model and the measured step, in milliseconds.

    Attributes:
        processes: P.
        compute: Forward and backward pass of a rank's examples, under a sample.
        update: Step of the optimiser, without other ranks.
        message: The row that ranks exchange before each reduction.
        reduction: That of gradients and statistics, by the model.
        predicted: Sum of these.
        measured: A whole step.
        error: Predicted over measured, less 1.
        reduction_measured: That of gradients and statistics, alone.
        reduction_of_ddp: That of the gradients alone in buckets, as DistributedDataParallel sends them.
        examples_per_second: Of all ranks.
        speedup: These over those of one process.
    """

    processes: int
    compute: float
    update: float
    message: float
    reduction: float
    predicted: float
    measured: float
    error: float
    reduction_measured: float
    reduction_of_ddp: float
    examples_per_second: float
    speedup: float


@dataclass(frozen=True)
class PaperRow:
    """So many GPUs, on paper.

    Attributes:
        network: Its name.
        gpus: How many, in machines of eight.
        megabytes: That a rank sends and receives in a step, gradients and statistics in float32.
        memory: Megabytes of parameters, optimiser and reduction on a rank.
        memory_in_shards: Likewise, with `shard=True`.
        step: Milliseconds of a step without other ranks.
        reduction: Milliseconds of the reduction, none of it hidden behind the backward pass.
        efficiency: Step without over step with the reduction.
        efficiency_bf16: Likewise, of `sync="bfloat16"`.
    """

    network: str
    gpus: int
    megabytes: float
    memory: float
    memory_in_shards: float
    step: float
    reduction: float
    efficiency: float
    efficiency_bf16: float


# Parameters, and images that a GPU of 2022 trains a second by SGD in bf16: assumptions, for none was at hand.
NETWORKS = {"resnet18": (11_689_512, 6000.0), "resnet50": (25_557_032, 2500.0)}
VOGN_COST = 1.7  # a step of VOGN over one of SGD on ImageNet (Osawa et al. 2019)
GPU_BATCH = 32  # examples of a rank, the paper's
WITHIN, BETWEEN = (
    200e9,
    40e9,
)  # bytes a second of a reduction: of eight GPUs of a machine, of machines at 400 Gbit/s a GPU
HOP = 15e-6  # seconds of a message
# Float32 numbers for each parameter.
_COPIES = {"mean": 1, "precision": 1, "sample": 1, "gradient": 1, "squares": 1, "buffer": 2}
_STATE = 1  # likewise, VOGN's momentum


def measure_scaling(
    processes: Sequence[int] = (1, 2, 4), model: str = "resnet20", batch: int = 32, rounds: int = 20
) -> list[ScalingRow]:
    """Measure steps of VOGN by several numbers of processes on this machine, each on one thread.

    Args:
        processes: Numbers of processes, the first of them 1.
        model: Name in the zoo, of a classifier of ten classes.
        batch: Examples of each process.
        rounds: Steps of each measurement.

    Raises:
        ValueError: If a number is not positive, or the first number of processes not 1.
    """
    for name, value in (("rounds", rounds), ("batch", batch), *(("processes", count) for count in processes)):
        at_least_one(name, value)
    if processes[0] != 1:
        raise ValueError(f"processes must begin with 1, with which the others are compared, got {processes[0]}.")
    found = {count: _times_of(count, {"model": model, "batch": batch, "rounds": rounds}) for count in processes}
    fitted = fit([(count, size, time) for count in processes for size, time in found[count].get("reductions", [])])
    single = found[processes[0]]["step"]
    return [_row(count, times, fitted, batch, single) for count, times in found.items()]


def _row(count: int, times: dict, fitted: tuple[float, float], batch: int, single: float) -> ScalingRow:
    reduction = reduction_time(count, 8 * times["parameters"], *fitted)
    message, step = times.get("message", 0.0), times["step"]
    predicted = times["compute"] + times["update"] + message + reduction
    return ScalingRow(
        processes=count,
        compute=_in_ms(times["compute"]),
        update=_in_ms(times["update"]),
        message=_in_ms(message),
        reduction=_in_ms(reduction),
        predicted=_in_ms(predicted),
        measured=_in_ms(step),
        error=round(predicted / step - 1, 3),
        reduction_measured=_in_ms(times.get("reduction", 0.0)),
        reduction_of_ddp=_in_ms(times.get("reduction_of_ddp", 0.0)),
        examples_per_second=round(count * batch / step, 1),
        speedup=round(count * single / step, 3),
    )


def _in_ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


def reduction_time(processes: int, size: float, latency: float, per_byte: float) -> float:
    """Return the seconds of a reduction of so many bytes in a ring.

    >>> reduction_time(4, 1e6, 1e-4, 1e-9)
    0.0018
    """
    return (processes - 1) * latency + 2 * (processes - 1) / processes * size * per_byte


def fit(reductions: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """Return latency and seconds per byte, both >= 0, that fit the seconds of reductions best, relative to each.

    Args:
        reductions: Processes, bytes and seconds of each.
    """
    if not reductions:
        return 0.0, 0.0
    terms = np.array([[(p - 1) / t, 2 * (p - 1) / p * size / t] for p, size, t in reductions])
    (latency, per_byte), *_ = np.linalg.lstsq(terms, np.ones(len(terms)), rcond=None)
    if latency < 0 or per_byte < 0:  # the other one alone
        column = 1 if latency < 0 else 0
        alone = float(terms[:, column].sum() / (terms[:, column] ** 2).sum())
        return (0.0, alone) if column else (alone, 0.0)
    return float(latency), float(per_byte)


def on_paper(gpus: Sequence[int] = (8, 128, 1024)) -> list[PaperRow]:
    """Return what the model says of VOGN on ImageNet by so many GPUs, from numbers of their makers and the paper."""
    rows = []
    for name, (parameters, images) in NETWORKS.items():
        step = VOGN_COST * GPU_BATCH / images
        for count in gpus:
            times = [step + _tree_time(count, size * parameters) for size in (8, 4)]
            numbers = parameters * sum(_COPIES.values())
            rows.append(
                PaperRow(
                    name,
                    count,
                    round(2 * (count - 1) / count * 8 * parameters / 1e6, 1),
                    round(4 * (numbers + _STATE * parameters) / 1e6, 1),
                    round(4 * (numbers + _STATE * parameters / count) / 1e6, 1),
                    round(1e3 * step, 2),
                    round(1e3 * (times[0] - step), 2),
                    *(round(step / time, 3) for time in times),
                )
            )
    return rows


def _tree_time(gpus: int, size: float) -> float:
    """Return the seconds of a reduction: within machines and between them, its messages along a tree."""
    machines = max(1, gpus // 8)
    within = 2 * 7 / 8 * size / WITHIN
    between = 2 * (machines - 1) / machines * size / 8 / BETWEEN  # each of the eight GPUs sends its eighth
    return within + between + 2 * math.log2(gpus) * HOP


def _times_of(count: int, asked: dict[str, object]) -> dict:
    """Return what so many processes measure, which take the cores in turn."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    ranks = []
    for rank in range(count):
        place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        own = {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "recipes.reports.scaling_ranks", json.dumps(asked)]
        ranks.append(subprocess.Popen(words, env=os.environ | own, stdout=subprocess.PIPE, text=True))
        _pin(ranks[-1].pid, rank)
    texts = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{count} processes must measure a step together, but one has failed: see its error above.")
    return json.loads(texts[0])


def _pin(process: int, rank: int) -> None:
    """Keep a process to one core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(process, {cores[rank % len(cores)]})
