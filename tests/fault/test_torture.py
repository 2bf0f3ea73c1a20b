"""Random work by many clients, `kill -9` at any moment, restart, a full check: again and again
(I1-I4, I6-I10, I13-I15), and whether what the clients of one log were told is linearizable.
"""

import asyncio
import os
import time

import pytest

from tests.conftest import MakeServer
from tests.helpers.torture import SETTINGS, Torture

KILLS = 20
KILLS_LONG = int(os.environ.get("BOP_TORTURE_SIZE", "200"))
LIFE_SECONDS = 0.5


async def torture(make_server: MakeServer, *, seed: int, kills: int) -> Torture:
    """A kill comes a random time after the clients began, so that no step is spared."""
    server = make_server(settings=SETTINGS)
    await server.start()
    clients, begun = Torture(seed), time.monotonic()
    await clients.create(server.client)
    for number in range(kills):
        life = asyncio.ensure_future(clients.work(server.client))
        await asyncio.wait({life}, timeout=clients.source.uniform(0.02, 2 * LIFE_SECONDS))
        if life.done():
            life.result()
            raise AssertionError("the service went away by itself")
        await server.kill9()
        await life
        await server.start()
        try:
            await clients.check(server)
        except BaseException as error:
            error.add_note(f"seed {seed}, after {number + 1} kills")
            raise
    assert await server.terminate() == 0, server.log_tail()
    seconds = time.monotonic() - begun
    print(f"\nseed {seed}: {kills} kills in {seconds:.0f} s, {dict(clients.done.most_common())}")
    return clients


@pytest.mark.timeout(300)
async def test_twenty_kills_lose_and_double_nothing(make_server: MakeServer) -> None:
    clients = await torture(make_server, seed=1, kills=KILLS)
    assert clients.done["append"] > 100
    assert clients.done["mismatch"] > 20
    assert clients.done["image"] > 10
    assert clients.done["checkpoint"] > 10


@pytest.mark.long
@pytest.mark.timeout(0)
async def test_many_kills(make_server: MakeServer) -> None:
    await torture(make_server, seed=int(time.time()), kills=KILLS_LONG)
