"""What the edge costs: a small JSON POST through all of it, against a bare FastAPI route."""

import os
from pathlib import Path

from benchmarks.http_load import post, run_load
from benchmarks.json_app import PATH, TOKEN
from benchmarks.report import Result, at_least
from benchmarks.service import free_port, running

BODY = b'{"number": 7, "items": ["one", "two", "three"]}'
ROUNDS = 3


async def small_posts(*, seconds: float = 2.0, connections: int = 32) -> list[Result]:
    """In turn, so that the machine's mood is shared; the best of each. The rate of a busy server
    is what its processor gives: counted by that, other processes disturb less.
    """
    request = post(PATH, BODY, content_type="application/json", Authorization=f"Bearer {TOKEN}")
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    by_cpu: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(ROUNDS):
        for name, found in rates.items():
            port = free_port()
            async with running("-m", "benchmarks.json_app", name, str(port), port=port) as process:
                await run_load(port, request, connections=connections, seconds=0.5)
                before = cpu_seconds(process.pid)
                load = await run_load(port, request, connections=connections, seconds=seconds)
                if load.failures:
                    raise RuntimeError(f"{load.failures} requests failed")
                found.append(load.per_second)
                by_cpu[name].append(load.requests / (cpu_seconds(process.pid) - before))
    what = "small JSON POSTs with edge, metrics and token ÷ the same on a bare FastAPI route"
    return [
        at_least(
            what, measured=max(rates["ours"]), ceiling=max(rates["bare"]), unit="req/s",
            target=0.6,
        ),
        at_least(
            f"{what}, by the server's processor time", measured=max(by_cpu["ours"]),
            ceiling=max(by_cpu["bare"]), unit="req/CPU-s", target=0.6,
        ),
    ]  # fmt: skip


def cpu_seconds(pid: int) -> float:
    """User and system time of the process (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
