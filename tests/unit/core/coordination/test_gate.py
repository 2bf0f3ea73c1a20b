import asyncio

import pytest

from app.core.base.errors import DatabaseNotFound, NotReady
from app.core.coordination.gate import Gate


async def test_closes_to_newcomers_and_waits_for_those_inside():
    gate = Gate()
    leave = asyncio.Event()
    inside = asyncio.Event()

    async def visit() -> None:
        with gate.enter():
            with gate.enter():  # a visitor may enter again
                inside.set()
            await leave.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(visit())
        await inside.wait()
        closing = group.create_task(gate.close(timeout_seconds=60))
        await asyncio.sleep(0)  # its first step closes
        assert gate.closed
        with pytest.raises(NotReady), gate.enter():
            raise AssertionError("entered a closed gate")
        assert gate.inside == 1
        assert not closing.done()
        leave.set()
        assert await closing is True
    assert gate.inside == 0
    assert await gate.close(timeout_seconds=60) is True  # again is harmless


async def test_gives_up_waiting_after_the_timeout_and_stays_closed():
    gate = Gate(refusal=lambda: DatabaseNotFound("The database is being deleted."))
    with gate.enter():
        assert await gate.close(timeout_seconds=0.01) is False
        with pytest.raises(DatabaseNotFound), gate.enter():
            raise AssertionError("entered a closed gate")
    assert await gate.close(timeout_seconds=60) is True


async def test_cancelled_close_leaves_it_closed_and_errors_leave_nobody_inside():
    gate = Gate()
    with pytest.raises(ValueError, match="inside"), gate.enter():
        raise ValueError("inside")
    assert gate.inside == 0
    with gate.enter():
        async with asyncio.TaskGroup() as group:
            closing = group.create_task(gate.close(timeout_seconds=60))
            await asyncio.sleep(0)
            assert gate.closed
            closing.cancel()
        assert closing.cancelled()
    with pytest.raises(NotReady), gate.enter():
        raise AssertionError("entered a closed gate")
