"""What a load scenario says: figures, and targets where there are some."""

import statistics
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    what: str
    figure: str
    target: str = ""
    met: bool = True


def at_most(what: str, value: float, limit: float, *, unit: str = "", digits: int = 1) -> Figure:
    return Figure(
        what=what,
        figure=f"{value:,.{digits}f} {unit}".strip(),
        target=f"≤ {limit:,g} {unit}".strip(),
        met=value <= limit,
    )


def exactly(what: str, value: int, wanted: int = 0) -> Figure:
    return Figure(what=what, figure=f"{value:,}", target=f"{wanted:,}", met=value == wanted)


def told(what: str, figure: str) -> Figure:
    return Figure(what=what, figure=figure)


def percentile(values: list[float], percent: int) -> float:
    """0 where nothing was measured."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def show(title: str, figures: list[Figure]) -> None:
    table = Table(title=title)
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_column("target", justify="right")
    table.add_column("")
    for one in figures:
        verdict = "" if not one.target else "[green]met[/]" if one.met else "[red]missed[/]"
        table.add_row(one.what, one.figure, one.target, verdict)
    Console(width=120).print(table)
