"""Terminal output: objects with a rich rendering as plain text, and text from files made printable."""

from __future__ import annotations

from io import StringIO

_LONGEST_LINE = 600  # characters


def as_text(renderable: object) -> str:
    """Return the text that `rich` prints for an object, without colours, in lines of at most 140 characters."""
    from rich.console import Console

    console = Console(file=StringIO(), width=140)
    with console.capture() as text:
        console.print(renderable)
    return text.get()


def printable(text: object) -> str:
    r"""Return text as one line that is safe to print on a terminal, whatever its source.

    Every white-space character becomes a space. Characters that are not printable become question marks: terminal
    escapes, other control characters, marks that change the direction of writing, and broken Unicode.

    >>> printable("7\x1b[31m red\n\u202eabc")
    '7?[31m red ?abc'
    """
    characters = (" " if character.isspace() else character for character in str(text))
    return "".join(character if character.isprintable() else "?" for character in characters)


def printable_lines(text: str) -> str:
    """Return text of several lines, each made printable."""
    return "\n".join(printable(line) for line in text.splitlines())


def one_line(text: object) -> str:
    r"""Return a message as one printable line; a long one loses its middle.

    >>> one_line("two\n  lines")
    'two lines'
    """
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[:400]} ... {line[-180:]}"
