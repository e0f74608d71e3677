"""Tables on a terminal: text from files made printable, and nothing cut where the terminal is narrow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def cell(value: object, style: str = "") -> Text:
    """Return a value as the text of a cell, without markup; a float with four digits behind the point."""
    from rich.text import Text

    from bayeslayers.display import printable

    return Text(f"{value:.4f}" if isinstance(value, float) else printable(value), style, overflow="fold")


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: int = 0, title: str | None = None
) -> None:
    """Print rows as a table; on a terminal that is too narrow for it, each as a block with a line for each column.

    Args:
        columns: Names of the columns.
        rows: Values of each row.
        numbers: So many columns, the last ones, hold numbers.
        title: Printed above.
    """
    from rich.console import Console
    from rich.table import Table

    console, texts = Console(highlight=False), len(columns) - numbers
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(cell(column), justify="left" if index < texts else "right")
    if title:
        console.print(cell(title))
    lines = [[cell(value) for value in row] for row in rows]
    for line in lines:
        table.add_row(*line)
    print_fitting(console, table, columns, lines, fit=console.is_terminal or "COLUMNS" in os.environ)


def print_fitting(
    console: Console, table: Table, columns: Sequence[str], rows: Sequence[Sequence[Text]], *, fit: bool
) -> None:
    """Print a table, or its rows as blocks where it is wider than the console.

    Args:
        console: Where to print.
        table: The table.
        columns: Names of its columns.
        rows: Cells of its rows.
        fit: Print blocks where the table does not fit; else the console is made wider.
    """
    from rich.table import Table

    needed = console.measure(table, options=console.options.update(width=100_000)).maximum
    if needed <= console.width or not fit:
        console.width = max(console.width, needed)
        console.print(table)
        return
    for number, row in enumerate(rows):
        block = Table.grid(padding=(0, 2, 0, 0))
        for column, text in zip(columns, row, strict=True):
            if text.plain:
                block.add_row(cell(column), text)
        if number:
            console.print()
        console.print(block)
    if table.caption:
        console.print(table.caption)
