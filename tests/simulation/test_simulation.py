"""The whole service on virtual time, with a seeded bucket, seeded kills and seeded users: safety
after every commit, liveness once the faults stop (I2, I4, I6, I7, I8, I9, I14, I15; fault rows 4,
37, 38, 39, 41, 42, 44).

`BOP_SIM_SEED=n` replays one seed and writes what happened beside its data.
"""

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation.seed import Outcome, run_seed
from tests.simulation.virtual_time import Stuck, VirtualLoop

SECONDS = 25.0
"""Of CPU time, so that other work beside it takes no seed away."""
SEEDS_MIN = 12
SEEDS_LONG = int(os.environ.get("BOP_TORTURE_SIZE", "200")) * 25
SEEDS_UNTIL_SEEN = 40


def run_all(seeds: range, place: Path, *, seconds: float, at_least: int) -> list[Outcome]:
    """In order, until the time is over. A failure says which seed it was."""
    outcomes: list[Outcome] = []
    begun = time.process_time()
    for seed in seeds:
        if len(outcomes) >= at_least and time.process_time() - begun > seconds:
            break
        try:
            outcomes.append(run_seed(seed, place))
        except BaseException as error:
            error.add_note(f"BOP_SIM_SEED={seed} replays it")
            raise
    tell(outcomes, time.process_time() - begun)
    return outcomes


def tell(outcomes: list[Outcome], cpu_seconds: float) -> None:
    faults, done, kills, ends = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    for outcome in outcomes:
        faults += outcome.faults
        done += outcome.done
        kills += outcome.kills
        ends += outcome.ends
    hours = sum(outcome.simulated_seconds for outcome in outcomes) / 3600
    print(
        f"\n{len(outcomes)} seeds from {outcomes[0].seed} in {cpu_seconds:.0f} s of CPU time: "
        f"{hours:.0f} simulated hours, {hours / max(cpu_seconds, 0.1) * 60:.0f} a minute; "
        f"{sum(one.steps for one in outcomes)} steps, all invariants after each of "
        f"{sum(one.checks for one in outcomes)} commits; {sum(one.lives for one in outcomes)} "
        f"lives, {kills.total()} kills at {len(kills)} places, {ends.total()} ended by their disk\n"
        f"faults: {dict(faults.most_common())}\nusers: {dict(done.most_common())}"
    )


@pytest.mark.timeout(300)
def test_seeds_hold_every_invariant_and_drain(place: Path) -> None:
    if (only := os.environ.get("BOP_SIM_SEED")) is not None:
        outcome = run_seed(int(only), place, log=place.with_suffix(".log"))
        tell([outcome], 0)
        return
    outcomes = run_all(range(10_000), place, seconds=SECONDS, at_least=SEEDS_MIN)
    assert sum(outcome.kills.total() for outcome in outcomes) >= SEEDS_MIN
    assert sum(outcome.faults.total() for outcome in outcomes) >= 10 * SEEDS_MIN
    for what in ("append", "frames", "checkpoint"):
        assert sum(outcome.done[what] for outcome in outcomes) >= 10 * SEEDS_MIN, what
    for what in ("image", "scan", "verify"):
        assert sum(outcome.done[what] for outcome in outcomes) >= SEEDS_MIN // 2, what
    assert sum(outcome.done["recovered"] for outcome in outcomes) >= 1
    disk = sum((one.faults for one in outcomes), Counter[str]())
    for area in ("wal", "scratch", "manifest"):
        assert disk[f"{area}: no room"] >= 1, area


@pytest.mark.long
@pytest.mark.timeout(0)
def test_many_seeds(place: Path) -> None:
    first = int(time.time())
    outcomes = run_all(range(first, first + SEEDS_LONG), place, seconds=0, at_least=SEEDS_LONG)
    assert len(outcomes) == SEEDS_LONG


@pytest.mark.parametrize("seed", [3, 5, 8])
def test_a_seed_runs_twice_alike(place: Path, seed: int) -> None:
    first, second = run_seed(seed, place), run_seed(seed, place)
    assert first.trace.events > 100
    assert first.trace.digest() == second.trace.digest()
    assert (first.steps, first.kills) == (second.steps, second.kills)


# --- the loop itself


def test_waiting_takes_no_time_and_keeps_its_order() -> None:
    loop = VirtualLoop(now=5.0, source=random.Random(1))
    seen: list[tuple[float, int]] = []

    async def wait(seconds: float, number: int) -> None:
        await asyncio.sleep(seconds)
        seen.append((loop.time(), number))

    async def main() -> None:
        await asyncio.gather(wait(3600, 1), wait(1, 2), wait(3600, 3))

    begun = time.monotonic()
    loop.run_until_complete(main())
    loop.close()
    assert [number for _, number in seen] == [2, 1, 3]
    assert seen[-1][0] == pytest.approx(3605.0)
    assert time.monotonic() - begun < 60


def test_who_waits_for_nothing_is_told() -> None:
    loop = VirtualLoop(now=0.0, source=random.Random(1))
    with pytest.raises(Stuck):
        loop.run_until_complete(loop.create_future())
    loop.close()
