"""The log against a plain list, through restarts and crashes in any order."""

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.core.base.errors import LsnMismatch
from app.core.formats.segment import EntryFlag
from app.core.stores.wal.log import WalLog
from app.core.stores.wal.pins import WalPin
from tests.unit.core.stores.wal.builders import (
    Place,
    append,
    append_together,
    read_all,
    request,
    settled,
)
from tests.unit.core.stores.wal.test_recovery import entry

T = TypeVar("T")
CHUNK = 200

records = st.lists(st.binary(max_size=90), min_size=1, max_size=6)
keys = st.sampled_from([b"k1", b"k2", b"k3", b"k4"])


class LogAgainstList(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        self.place = Place(root=self.directory / "wal")
        self.expected: dict[int, bytes] = {}
        self.next_lsn = 1
        self.answers: dict[bytes, tuple[int, int]] = {}
        self.pins: list[WalPin] = []
        self.remembered: list[Any] = []
        self.open()

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(step)

    def open(self) -> None:
        async def enter() -> tuple[AsyncExitStack, WalLog]:
            stack = AsyncExitStack()
            log = await stack.enter_async_context(
                self.place.log(chunk_bytes=CHUNK, remembered=self.remembered, has_lived=True)
            )
            return stack, log

        self.stack, self.log = self.run(enter())

    def close(self) -> None:
        self.pins.clear()
        self.run(self.stack.aclose())

    def take(self, values: list[bytes]) -> tuple[int, int]:
        first = self.next_lsn
        self.expected.update(enumerate(values, first))
        self.next_lsn += len(values)
        return first, self.next_lsn - 1

    @rule(values=records, per_entry=st.integers(1, 3))
    def append(self, values: list[bytes], per_entry: int) -> None:
        done = self.run(append(self.log, *values, per_entry=per_entry))
        assert (done.first_lsn, done.last_lsn) == self.take(values)

    @rule(group=st.lists(records, min_size=2, max_size=5))
    def append_group(self, group: list[list[bytes]]) -> None:
        answers = self.run(append_together(self.log, *(request(*values) for values in group)))
        assert [(one.first_lsn, one.last_lsn) for one in answers] == [  # type: ignore[union-attr]
            self.take(values) for values in group
        ]

    @rule(values=records, off=st.sampled_from([-1, 0, 0, 1]))
    def append_if(self, values: list[bytes], off: int) -> None:
        conditional = append(self.log, *values, expected=self.next_lsn + off)
        if off:
            with pytest.raises(LsnMismatch):
                self.run(conditional)
        else:
            assert self.run(conditional).first_lsn == self.take(values)[0]

    @rule(values=records, key=keys)
    def append_keyed(self, values: list[bytes], key: bytes) -> None:
        done = self.run(append(self.log, *values, key=key, per_entry=1))
        first = key not in self.answers
        assert done.replayed is not first
        if first:
            self.answers[key] = self.take(values)
        assert (done.first_lsn, done.last_lsn) == self.answers[key]

    @rule()
    def seal(self) -> None:
        self.run(self.log.seal())
        assert self.log.unsealed_bytes == 0

    @rule(up=st.integers(1, 50))
    def raise_floor(self, up: int) -> None:
        self.next_lsn += up
        self.log.raise_floor(self.next_lsn)

    @rule(at=st.floats(0, 1))
    def pin(self, at: float) -> None:
        lsn = int(self.next_lsn * at)
        pin = self.log.pin(lsn, lsn + 10)
        assert all(segment.path.exists() for segment in pin.segments)
        self.pins.append(pin)

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.pins.pop().release()

    @rule()
    def checkpoint_and_remove(self) -> None:
        """Everything sealed is published; what no reader holds goes."""
        self.run(settled(self.log))
        for info in self.log.sealed_segments():
            if info.state == "sealed":
                self.remembered += self.log.remembered_of(info.segment_id)
                self.place.catalog.checkpoint(info.segment_id)
        segments = {info.segment_id: info for info in self.log.sealed_segments()}
        self.log.mark_checkpointed(segments)
        held = {segment.segment_id for pin in self.pins for segment in pin.segments}
        removed = self.run(self.log.remove(list(segments)))
        assert set(removed) == segments.keys() - held
        for segment_id in removed:
            assert not segments[segment_id].path.exists()
            del self.place.catalog.rows[7][segment_id]
            for lsn in range(segments[segment_id].first_lsn, segments[segment_id].last_lsn + 1):
                del self.expected[lsn]

    @rule()
    def restart(self) -> None:
        self.close()
        self.open_above_the_floor()

    @rule(junk=st.binary(min_size=1, max_size=200))
    def crash_with_junk(self, junk: bytes) -> None:
        self.crash(junk)

    @rule(values=records, part=st.floats(0, 1), flags=st.sampled_from([3, 1]))
    def crash_within_an_append(self, values: list[bytes], part: float, flags: int) -> None:
        """The unacknowledged one is wholly there or wholly absent."""
        torn = entry(self.next_lsn, *values, durable_lsn=self.next_lsn - 1, flags=EntryFlag(flags))
        rows = self.place.catalog.of()
        follows = bool(rows) and rows[-1].state == "open" and self.next_lsn - 1 in self.expected
        size = round(len(torn) * part)
        if not follows:  # a writer would have made a new segment
            size = min(size, len(torn) - 1)
        self.crash(torn[:size])
        if follows and size == len(torn) and flags == 3:
            self.take(values)

    def crash(self, tail: bytes) -> None:
        self.close()
        rows = self.place.catalog.of()
        if rows and rows[-1].state == "open":
            path = self.place.files()[-1]
            path.write_bytes(path.read_bytes() + tail)
        self.open_above_the_floor()

    def open_above_the_floor(self) -> None:
        """As the manifest would: the floor never falls below what was given out and published."""
        self.open()
        self.log.raise_floor(self.next_lsn)

    @invariant()
    def holds_exactly_the_list(self) -> None:
        assert self.log.health == "ok"
        assert read_all(self.log) == self.expected
        assert self.log.next_lsn == self.next_lsn
        assert self.place.fatal == []

    def teardown(self) -> None:
        self.close()
        self.runner.close()
        shutil.rmtree(self.directory)


TestLogAgainstList = LogAgainstList.TestCase
TestLogAgainstList.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
