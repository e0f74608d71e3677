"""The command `bayeslayers verify`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math

from recipes.cli.options import add_data_root, add_json, add_posterior


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `verify`."""
    which = parser.add_mutually_exclusive_group(required=True)
    add_posterior(which, nargs="?")
    which.add_argument("--all", action="store_true", help="every bundled posterior")
    add_data_root(parser, "folder of test data, to check all metrics on")
    parser.add_argument("--record", action="store_true", help="measure on the bundled slice, and write to the card")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Re-evaluate posteriors and compare with their cards; status 1 if a metric differs."""
    import zoo
    from recipes.reports.verify import record, verify

    names = zoo.list_posteriors() if arguments.all else [arguments.posterior]
    if arguments.record:
        for name in names:
            record(name)
    checks = [check for name in names for check in verify(name, arguments.data_root)]
    rows = [dataclasses.asdict(check) | {"ok": check.ok} for check in checks]
    if arguments.json:
        plain = [{key: _finite(value) for key, value in row.items()} for row in rows]
        print(json.dumps(plain, indent=2, allow_nan=False))
    else:
        from recipes.reports.tables import print_table

        keys = ("metric", "claimed", "measured", "tolerance", "ok")
        for (name, data), group in itertools.groupby(rows, lambda row: (row["posterior"], row["data"])):
            lines = [[f"{row[key]:.5f}" if type(row[key]) is float else row[key] for key in keys] for row in group]
            print_table(keys, lines, title=f"{name} on {data}")
    return 0 if all(check.ok for check in checks) else 1


def _finite(value: object) -> object:
    """Return the value, or None for a number that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
