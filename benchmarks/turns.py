"""Two servers under the same load in turn, a short while each, several times.

The machine's mood is shared that way. The best rate of each counts, and the least CPU time that a
request took its process: of the two figures that one is moved less by what else runs.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks.http_load import run_load
from benchmarks.report import Result, at_least
from benchmarks.service import cpu_seconds, free_port, running

WARM_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    port: int
    process: asyncio.subprocess.Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    per_second: float
    cpu_us: float
    """A request's, user's and system's."""


@asynccontextmanager
async def bare_api() -> AsyncIterator[Side]:
    port = free_port()
    arguments = ("-m", "benchmarks.bare_app", "api", str(port))
    async with running(*arguments, port=port) as process:
        yield Side(port=port, process=process)


async def in_turn(
    sides: Mapping[str, Side],
    request: list[bytes],
    *,
    connections: int,
    rounds: int,
    seconds: float,
) -> dict[str, Taken]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    costs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            await run_load(side.port, request, connections=connections, seconds=WARM_SECONDS)
            before = cpu_seconds(side.process)
            run = await run_load(side.port, request, connections=connections, seconds=seconds)
            if run.failures:
                raise RuntimeError(f"{run.failures} requests to {name} failed")
            rates[name].append(run.per_second)
            costs[name].append((cpu_seconds(side.process) - before) / run.requests * 1e6)
    return {name: Taken(per_second=max(rates[name]), cpu_us=min(costs[name])) for name in sides}


def against_bare(name: str, taken: Mapping[str, Taken], *, target: float) -> Result:
    """`ours` against `bare`."""
    ours, bare = taken["ours"], taken["bare"]
    return at_least(
        name, measured=ours.per_second, ceiling=bare.per_second, unit="req/s", target=target,
        notes=(f"{ours.cpu_us:.0f} µs CPU", f"{bare.cpu_us:.0f} µs CPU"),
    )  # fmt: skip
