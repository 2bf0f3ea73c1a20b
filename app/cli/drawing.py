"""All that is drawn with rich, apart from the rest because its import takes a tenth of a second."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.cli.units import plain_text

if TYPE_CHECKING:
    from app.cli.screen import Column, Meter

UNBOUNDED_WIDTH = 10_000


def draw_line(stream: TextIO, markup: str) -> None:
    console_of(stream).print(markup, highlight=False, soft_wrap=True)


def draw_table(stream: TextIO, columns: "Sequence[Column]", rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.name, justify="right" if column.right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(plain_text(cell, one_line=True)) for cell in row))
    # a narrow terminal wraps the lines; rich would leave out whole columns
    Console(file=stream, width=UNBOUNDED_WIDTH).print(table)


def draw_facts(stream: TextIO, facts: Mapping[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, escape(plain_text(value)))
    console_of(stream).print(table)


@contextmanager
def drawn_meter(stream: TextIO) -> "Iterator[Meter]":
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console_of(stream),
        transient=True,
    ) as progress:
        task = progress.add_task("")

        def show(text: str, done: float, total: float | None) -> None:
            progress.update(task, description=escape(text), completed=done, total=total)

        yield show


def console_of(stream: TextIO) -> Console:
    """Made when needed: the standard streams may have been replaced since. What is piped is not
    cut to the width of a terminal.
    """
    return Console(file=stream, width=None if stream.isatty() else UNBOUNDED_WIDTH)
