"""A writer of records knows exactly what its database must hold, except for the one call that a
kill left unanswered; after the kill it finds out which of the two it was, and no third is allowed.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from hashlib import blake2b

from app.container.service import Container
from app.core.base.errors import (
    Conflict,
    CorruptBlob,
    LsnMismatch,
    LsnOutOfRange,
    LsnTruncated,
    Unavailable,
)
from app.core.services.databases import DatabaseSpec
from app.core.stores.manifest.errors import RowPinned
from app.core.stores.wal.requests import Appended, MemoryPayload
from tests.simulation.bucket import Violation
from tests.simulation.content import Ledger, Unanswered, packed, read_all
from tests.simulation.crowd import REFUSED, Crowd

CHUNK_BYTES = 65536


class Writer:
    def __init__(self, crowd: Crowd, container: Container, ledger: Ledger) -> None:
        self._crowd = crowd
        self._source = crowd.source
        self._services = container.services
        self._container = container
        self._ledger = ledger

    async def run(self) -> None:
        """For ever. What is not answered before a kill stays `unanswered`."""
        await self.settle()
        steps: list[Callable[[], Awaitable[None]]] = [
            self.append, self._read, self._truncate_head, self._truncate_tail,
        ]  # fmt: skip
        while True:
            await self._crowd.pause()
            await self._source.choices(steps, [70, 20, 4, 4])[0]()

    # --- what became of the call that was not answered

    async def settle(self) -> None:
        ledger, services = self._ledger, self._services
        if not ledger.made:
            await self._make()
        while jobs := services.jobs.list(
            tenant=ledger.tenant, database=ledger.name, kinds=["truncate_append_only"],
            states=["pending", "in_flight"], limit=1, after=None,
        ):  # fmt: skip
            await services.jobs.wait(jobs[0].job_id, seconds=3600)
        while ledger.unanswered is not None and not self._crowd.is_dead():
            if await self._resolve(ledger.unanswered):
                ledger.unanswered = None
            else:
                await asyncio.sleep(60)
        self.check_status()

    async def _make(self) -> None:
        ledger = self._ledger
        spec = DatabaseSpec(
            engine="append_only",
            chunk_bytes=CHUNK_BYTES,
            compression=self._source.choice(["none", "zstd"]),
        )
        while not ledger.made:
            try:
                with suppress(Conflict):  # made by the call that was not answered, otherwise
                    await self._services.databases.create(ledger.tenant, ledger.name, spec)
            except REFUSED:
                await asyncio.sleep(60)
                continue
            ledger.made = True

    def check_status(self) -> None:
        ledger = self._ledger
        status = self._services.databases.get(ledger.tenant, ledger.name)
        health = status.health if status.health != "unhealthy_generation" else "ok"  # it had rotted
        if not self._crowd.is_dead() and (health, status.next_lsn) != ("ok", ledger.next_lsn):
            raise Violation(
                f"{ledger.name} is {status.health} and goes on at {status.next_lsn}, "
                f"not {ledger.next_lsn}"
            )

    async def _resolve(self, call: Unanswered) -> bool:
        """False, where it cannot be known yet."""
        ledger = self._ledger
        status = self._services.databases.get(ledger.tenant, ledger.name)
        if call.head is not None:
            ledger.cut_head(status.first_lsn, asked=call.head)
        elif call.tail is not None:
            found = await self._whole()
            if found is None or self._crowd.is_dead():
                return False
            if found.keys() != ledger.records.keys():
                ledger.cut_tail(call.tail)
            ledger.check(found)
        elif call.key is None:
            if status.next_lsn != ledger.next_lsn:
                ledger.add(call.payloads)
        else:
            try:
                appended = await self._send(call)
            except REFUSED:
                return False
            if self._crowd.is_dead():
                return False
            ledger.take(appended, call.payloads)
        return True

    # --- records

    async def append(self) -> None:
        crowd, ledger, source = self._crowd, self._ledger, self._source
        count = source.choice([1, 1, 2, 5, 20])
        payloads = [
            source.randbytes(8) + b"x" * source.choice([0, 100, 3000, 12_000]) for _ in range(count)
        ]
        key = source.randbytes(16) if source.random() < 0.4 else None
        call = Unanswered(payloads=payloads, key=key)
        if source.random() < 0.1:
            await self._append_elsewhere(payloads)
        late = crowd.wal_has_failed()
        ledger.unanswered = call
        try:
            appended = await self._send(call)
        except REFUSED:
            if not crowd.is_dead():
                ledger.unanswered = None
                crowd.done["append refused"] += 1
            return
        if crowd.is_dead():
            return
        crowd.must_not_be_told("an append", begun_after_failure=late)
        ledger.unanswered = None
        ledger.take(appended, payloads)
        crowd.done["append"] += 1
        if key is not None and source.random() < 0.2:
            again = await self._send(call)
            if (again.first_lsn, again.replayed) != (appended.first_lsn, True):
                raise Violation(f"an append of {ledger.name} happened twice: {again}")

    async def _append_elsewhere(self, payloads: list[bytes]) -> None:
        """With the wrong `If-Match`: it must have no effect."""
        ledger = self._ledger
        wrong = ledger.next_lsn + self._source.choice([-1, 1, 7])
        try:
            await self._services.records.append(
                ledger.tenant, ledger.name, [_entry(payloads)],
                expected_next_lsn=wrong, key_hash=None, body_hash=None,
            )  # fmt: skip
        except (LsnMismatch, *REFUSED):
            self._crowd.done["mismatch"] += 1
        else:
            raise Violation(f"an append at {wrong} was taken at {ledger.next_lsn}")

    async def _send(self, call: Unanswered) -> Appended:
        entry = _entry(call.payloads)
        return await self._services.records.append(
            self._ledger.tenant,
            self._ledger.name,
            [entry],
            expected_next_lsn=self._ledger.next_lsn if call.key is None else None,
            key_hash=call.key,
            body_hash=blake2b(entry.payload, digest_size=16).digest() if call.key else None,
        )

    async def _read(self) -> None:
        found = await self._whole()
        if found is not None and not self._crowd.is_dead():
            self._ledger.check(found)
            self._crowd.done["read"] += 1

    async def _whole(self) -> dict[int, bytes] | None:
        """None, where the bucket stands in the way."""
        try:
            return await read_all(self._container, self._ledger.tenant, self._ledger.name)
        except Unavailable:
            return None
        except CorruptBlob as error:
            self._crowd.bear(error)
            return None

    # --- truncations

    async def _truncate_head(self) -> None:
        if self._ledger.records:
            lsn = self._source.randint(min(self._ledger.records), self._ledger.next_lsn)
            await self._truncate(Unanswered(head=lsn))

    async def _truncate_tail(self) -> None:
        if self._ledger.records:
            newest = sorted(self._ledger.records)[-30:]
            await self._truncate(Unanswered(tail=self._source.choice(newest)))

    async def _truncate(self, call: Unanswered) -> None:
        crowd, ledger, services = self._crowd, self._ledger, self._services
        ledger.unanswered = call
        lsn = call.head if call.head is not None else call.tail
        assert lsn is not None
        try:
            job = await services.truncations.request(
                ledger.tenant,
                ledger.name,
                direction="head" if call.head is not None else "tail",
                lsn=lsn,
                on_lease=self._source.choice(["wait", "cancel"]),
                lease_timeout_seconds=30,
                principal="writer",
            )
        except (LsnOutOfRange, LsnTruncated, RowPinned, Conflict, *REFUSED):
            if not crowd.is_dead():
                ledger.unanswered = None
                crowd.done["truncation refused"] += 1
            return
        job = await services.jobs.wait(job.job_id, seconds=24 * 3600)
        if crowd.is_dead():
            return
        ledger.unanswered = None
        if job.state != "completed":
            if job.state not in {"failed", "cancelled"}:
                raise Violation(f"a truncation is {job.state} after a day")
            crowd.done["truncation failed"] += 1
            return
        crowd.done["truncation"] += 1
        first = services.databases.get(ledger.tenant, ledger.name).first_lsn
        if call.tail is not None:
            ledger.cut_tail(call.tail)
        else:
            ledger.cut_head(first, asked=lsn)


def _entry(payloads: list[bytes]) -> MemoryPayload:
    return MemoryPayload(payload=packed(payloads), count=len(payloads), line_safe=False)
