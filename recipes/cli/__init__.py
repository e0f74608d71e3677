"""The command line, `bayeslayers COMMAND`."""

from recipes.cli.parser import main

__all__ = ["main"]
