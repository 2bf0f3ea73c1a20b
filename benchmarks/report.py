"""What a benchmark says: a figure, the raw ceiling of the same run, their ratio, and the target."""

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    name: str
    measured: str
    ceiling: str
    ratio: float
    target: str
    met: bool


NO_NOTES = ("", "")


def at_least(
    name: str,
    *,
    measured: float,
    ceiling: float,
    unit: str,
    target: float,
    notes: tuple[str, str] = NO_NOTES,
) -> Result:
    """A rate against the rate of the raw ceiling: the higher the better. `notes` go with the one
    and the other.
    """
    ratio = measured / ceiling
    return Result(
        name=name,
        measured=noted(f"{measured:,.1f} {unit}", notes[0]),
        ceiling=noted(f"{ceiling:,.1f} {unit}", notes[1]),
        ratio=ratio,
        target=f"≥ {target}",
        met=ratio >= target,
    )


def at_most(name: str, *, measured: float, limit: float, unit: str) -> Result:
    """A figure that must stay below a limit."""
    return Result(
        name=name,
        measured=f"{measured:,.1f} {unit}",
        ceiling=f"{limit:,.1f} {unit}",
        ratio=measured / limit,
        target="≤ 1.0",
        met=measured <= limit,
    )


def noted(figure: str, note: str) -> str:
    return f"{figure}, {note}" if note else figure


def show(results: list[Result], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(result) for result in results], indent=2))
        return
    table = Table(title="Ratios against raw ceilings measured in the same run")
    for heading in ("benchmark", "measured", "ceiling", "ratio", "target", ""):
        table.add_column(heading)
    for result in results:
        table.add_row(
            result.name, result.measured, result.ceiling, f"{result.ratio:.2f}", result.target,
            "[green]met[/]" if result.met else "[red]missed[/]",
        )  # fmt: skip
    Console(width=170).print(table)
