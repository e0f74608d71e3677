"""The command `bayeslayers demo`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from recipes.cli.options import add_device, add_samples, typed_path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    parser.add_argument("--output", type=typed_path, default=Path("demo.png"), help="picture to write (%(default)s)")
    add_samples(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Show what bundled posteriors know and do not know, as a table and a picture."""
    _check_picture(arguments.output)
    from recipes.reports.demo import demo

    demo(arguments.output, arguments.num_samples, arguments.seed, arguments.device)
    return 0


def _check_picture(path: Path) -> None:
    """Reject a picture that could not be written, and make its folder."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"output must be a .png file, got {path}.")
    if path.is_dir():
        raise IsADirectoryError(f"output must be a .png file, got {path}, which is a folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"output must be in a folder that can be made, got {path}: {error.strerror}.") from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"output must be a file that you may write, got {path}.")
