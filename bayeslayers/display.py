"""What is shown on a terminal: objects with a rich rendering as plain text, and text from files made printable."""

from __future__ import annotations

from io import StringIO

_LONGEST_LINE = 600  # characters


def as_text(renderable: object) -> str:
    """Return what `rich` prints of an object, without colours, in lines of 140 characters at most."""
    from rich.console import Console

    console = Console(file=StringIO(), width=140)
    with console.capture() as text:
        console.print(renderable)
    return text.get()


def printable(text: object) -> str:
    r"""Return text in one line that a terminal shows as it is, wherever the text came from.

    White space becomes a space. What has no form of its own becomes a question mark: terminal escapes, other control
    characters, marks that change the direction of writing, broken Unicode.

    >>> printable("7\x1b[31m red\n\u202eabc")
    '7?[31m red ?abc'
    """
    characters = (" " if character.isspace() else character for character in str(text))
    return "".join(character if character.isprintable() else "?" for character in characters)


def printable_lines(text: str) -> str:
    """Return text of several lines, each made printable."""
    return "\n".join(printable(line) for line in text.splitlines())


def one_line(text: object) -> str:
    r"""Return a message as one printable line, without its middle where it is long.

    >>> one_line("two\n  lines")
    'two lines'
    """
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[:400]} ... {line[-180:]}"
