"""What has a rich rendering, as plain text."""

from __future__ import annotations

from io import StringIO


def as_text(renderable: object) -> str:
    """Return what `rich` prints of an object, without colours, in lines of 140 characters at most."""
    from rich.console import Console

    console = Console(file=StringIO(), width=140)
    with console.capture() as text:
        console.print(renderable)
    return text.get()
