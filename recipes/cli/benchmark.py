"""The command `bayeslayers benchmark`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from recipes.cli.options import add_data_root, add_json, typed_path

_MODELS = ["mlp", "lenet5"]
_TASKS = ["toy", "mnist", "energy"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `benchmark`."""
    parser.add_argument(
        "what",
        choices=["step", "load", "predict", "defaults", "convert", "scaling", "routes", "memory", "growth"],
        help="step: a training step of VOGN beside one of Adam; load: a posterior loaded to predict one image, beside "
        "plain torch; predict: 32 samples beside 32 forward passes; defaults: what VOGN and IVON reach when only "
        "dataset_size is given, beside Adam; convert: networks of other libraries, converted, trained by a step, "
        "saved and loaded; scaling: steps of VOGN by several processes beside a model of their cost; routes: ways to "
        "the squares of a layer's gradients, and the one that is chosen; memory: the peak of a step beside Adam's; "
        "growth: a step by batch, width, depth and samples",
    )
    parser.add_argument("--rounds", type=int, default=100, help="interleaved runs of each (%(default)s)")
    _add_names(parser, "--optimizers", ["vogn"], "step: beside Adam, as vogn or kfac,inverse_every=50 (vogn)")
    models = "step: classifiers of the zoo, bert gpt2 lstm swin encoder unet_small layers200 (mlp lenet5); "
    models += "scaling: one of ten classes (resnet20); predict: of the zoo (mlp lenet5 resnet20); "
    models += "memory: classifiers of the zoo, mlp4096 (resnet18_cifar mlp4096)"
    _add_names(parser, "--models", _MODELS, models)
    tasks = f"defaults: of {' '.join(_TASKS)} (these), fashion resnet18 unet bert gpt2 lstm (minutes)"
    _add_names(parser, "--tasks", _TASKS, tasks)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="defaults: runs of each (%(default)s)")
    parser.add_argument("--only", metavar="PATTERN", help="convert: networks whose names fit, as 'timm:*' (all)")
    text = "convert: file of results, which a further call goes on with (none)"
    parser.add_argument("--file", type=typed_path, metavar="PATH", help=text)
    parser.add_argument("--seconds", type=int, default=180, help="convert: limit of time for each (%(default)s)")
    parser.add_argument("--gigabytes", type=float, default=6.0, help="convert: limit of memory (%(default)s)")
    parser.add_argument(
        "--processes", nargs="+", type=int, default=[1, 2, 4], metavar="P", help="scaling: their numbers (1 2 4)"
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="scaling: examples of each (%(default)s)")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="step: samples of each (%(default)s)")
    parser.add_argument("--turn", type=int, default=10, metavar="N", help="step: steps of a turn (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=0, metavar="N", help="step: steps before (%(default)s)")
    add_data_root(parser, "defaults: folder of data (stand-ins are generated)")
    text = "step, predict: time of the process, not of the clock; growth always takes it"
    parser.add_argument("--cpu-time", action="store_true", help=text)
    text = "predict: examples of each (1 64 512)"
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 512], metavar="N", help=text)
    text = "predict: bayesian-torch, torchbnn, blitz and torch-uncertainty too, if installed"
    parser.add_argument("--peers", action="store_true", help=text)
    parser.add_argument("--chart", type=typed_path, metavar="PATH", help="growth: file for a picture (none)")
    add_json(parser)


def _add_names(parser: argparse.ArgumentParser, option: str, default: list[str], text: str) -> None:
    parser.add_argument(option, nargs="+", default=default, metavar="NAME", help=text)


def run(arguments: argparse.Namespace) -> int:
    """Measure costs as ratios, what the defaults reach, which networks convert and train, or what processes cost."""
    if arguments.what == "convert":
        return _convert(arguments)
    if arguments.what == "scaling":
        return _scaling(arguments)
    from recipes.reports.benchmark import benchmark_load, benchmark_step

    if arguments.what == "defaults":
        from recipes.reports.benchmark_defaults import benchmark_defaults

        measured = benchmark_defaults(arguments.tasks, arguments.seeds, arguments.data_root)
    elif arguments.what == "step":
        measured = benchmark_step(
            arguments.rounds,
            optimizers=arguments.optimizers,
            models=arguments.models,
            cpu=arguments.cpu_time,
            num_samples=arguments.samples,
            turn=arguments.turn,
            warm_up=arguments.warm_up,
        )
    elif arguments.what == "routes":
        from recipes.reports.benchmark_routes import benchmark_routes

        measured = benchmark_routes(arguments.rounds)
    elif arguments.what in _MEASURES:
        measured = _MEASURES[arguments.what](arguments)
    else:
        measured = benchmark_load(arguments.rounds)
    rows = [dataclasses.asdict(row) for row in measured]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)
    return 0


def _predict(arguments: argparse.Namespace) -> list[Any]:
    from recipes.reports.benchmark_predict import MODELS, benchmark_predict

    options = {"batches": arguments.batches, "cpu": arguments.cpu_time, "peers": arguments.peers}
    return benchmark_predict(arguments.rounds, models=_named(arguments, MODELS), **options)


def _memory(arguments: argparse.Namespace) -> list[Any]:
    from recipes.reports.benchmark_memory import MODELS, benchmark_memory

    return benchmark_memory(_named(arguments, MODELS))


def _growth(arguments: argparse.Namespace) -> list[Any]:
    from recipes.reports.benchmark_growth import benchmark_growth

    return benchmark_growth(arguments.rounds, chart=arguments.chart)


def _named(arguments: argparse.Namespace, default: Sequence[str]) -> Sequence[str]:
    return default if arguments.models is _MODELS else arguments.models  # not where the same names are given


_MEASURES = {"predict": _predict, "memory": _memory, "growth": _growth}


def _convert(arguments: argparse.Namespace) -> int:
    """Print the conversion table."""
    from recipes.reports.benchmark_convert import HEAD, benchmark_convert, shown, totals

    rows = benchmark_convert(arguments.only, arguments.file, arguments.seconds, arguments.gigabytes)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    from recipes.reports.tables import print_table

    print_table(HEAD, [shown(row) for row in rows])
    print(totals(rows))
    return 0


def _scaling(arguments: argparse.Namespace) -> int:
    """Measure several processes on this machine, and print beside them what the model says of many GPUs."""
    from recipes.reports.scaling import measure_scaling, on_paper

    model = arguments.models[0] if arguments.models is not _MODELS else "resnet20"
    measured = measure_scaling(arguments.processes, model, arguments.batch, arguments.rounds)
    found = {"measured": measured, "on_paper": on_paper()}
    tables = {key: [dataclasses.asdict(row) for row in rows] for key, rows in found.items()}
    if arguments.json:
        print(json.dumps(tables, indent=2))
    else:
        for rows in tables.values():
            _print(rows)
    return 0


def _print(rows: list[dict[str, Any]]) -> None:
    from recipes.reports.tables import print_table

    print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
