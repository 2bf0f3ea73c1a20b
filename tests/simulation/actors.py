"""Who uses the service: a writer for each database, and one who does everything else to it.

A writer knows exactly what its database must hold, except for the one call that a kill left
unanswered; after the kill it finds out which of the two it was, and no third is allowed.
"""

import asyncio
import random
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b

from app.container.service import Container
from app.core.base.errors import (
    Backpressure,
    Conflict,
    CorruptBlob,
    GenerationExpired,
    JobAlreadyEnded,
    LsnMismatch,
    LsnOutOfRange,
    LsnTruncated,
    NotFound,
    QuotaExhausted,
    Unavailable,
)
from app.core.services.databases import DatabaseSpec
from app.core.services.states import Newest
from app.core.stores.manifest.errors import RowPinned
from app.core.stores.manifest.records import Retention
from app.core.stores.wal.requests import Appended, MemoryPayload
from app.core.workers.collector import RoundRequest
from app.routers.raw_bodies import HeldBody
from tests.helpers.torture import sqlite_image
from tests.simulation.bucket import Violation

_LENGTH = struct.Struct("<I")
CHUNK_BYTES, PAGE = 65536, 512


@dataclass(kw_only=True)
class Unanswered:
    """An append or a truncation of which nobody knows."""

    payloads: list[bytes] = field(default_factory=list)
    key: bytes | None = None
    head: int | None = None
    tail: int | None = None


@dataclass
class Ledger:
    """What one database must hold."""

    tenant: str
    name: str
    records: dict[int, bytes] = field(default_factory=dict)
    first_lsn: int = 1
    next_lsn: int = 1
    unanswered: Unanswered | None = None
    made: bool = False
    turns: int = 0
    """Grows with each change, so that a reader notices one beside it."""
    history: dict[int, bytes] = field(default_factory=dict)
    """Every record that ever was acknowledged."""

    def take(self, appended: Appended, payloads: list[bytes]) -> None:
        if (appended.first_lsn, appended.count) != (self.next_lsn, len(payloads)):
            raise Violation(
                f"{len(payloads)} records of {self.name} got LSN {appended.first_lsn}, "
                f"and {self.next_lsn} was next"
            )
        self.add(payloads)

    def add(self, payloads: list[bytes]) -> None:
        self.turns += 1
        for payload in payloads:
            self.records[self.next_lsn] = self.history[self.next_lsn] = payload
            self.next_lsn += 1

    def cut_head(self, first_lsn: int, *, asked: int) -> None:
        """Chunks that ended below `asked` are gone. Records may be missing behind it, too, where a
        tail truncation had taken them: then the log begins behind that gap.
        """
        kept = [lsn for lsn in self.records if asked <= lsn < first_lsn]
        if first_lsn < self.first_lsn or kept:
            raise Violation(f"{self.name} begins at {first_lsn} after a truncation at {asked}")
        self.turns += 1
        self.first_lsn = first_lsn
        self.records = {lsn: data for lsn, data in self.records.items() if lsn >= first_lsn}

    def cut_tail(self, lsn: int) -> None:
        self.turns += 1
        self.records = {at: data for at, data in self.records.items() if at < lsn}

    def check(self, found: dict[int, bytes]) -> None:
        if found != self.records:
            missing = sorted(self.records.keys() - found.keys())
            extra = sorted(found.keys() - self.records.keys())
            raise Violation(
                f"{self.tenant}/{self.name} reads wrong: missing {missing[:10]}, extra "
                f"{extra[:10]} of {len(self.records)}, LSNs {self.first_lsn}..{self.next_lsn - 1}"
            )


async def read_all(container: Container, tenant: str, name: str) -> dict[int, bytes]:
    """Every readable record, over gaps."""
    services = container.services
    status = services.databases.get(tenant, name)
    at, end, found = status.first_lsn, status.next_lsn, dict[int, bytes]()
    while at < end:
        stream = await services.records.open_read(
            tenant, name, from_lsn=at, to_lsn=end - 1, limit=None, wait_seconds=0, as_lines=False
        )
        try:
            body = b"".join([piece async for piece in stream.content])
        finally:
            await stream.aclose()
        lsn, offset = stream.first_lsn, 0
        while offset < len(body):
            (length,) = _LENGTH.unpack_from(body, offset)
            offset += _LENGTH.size + length
            assert lsn is not None
            found[lsn] = body[offset - length : offset]
            lsn += 1
        if stream.next_lsn <= at:
            raise Violation(f"a read of {name} from {at} would go on at {stream.next_lsn}")
        at = stream.next_lsn
    return found


async def read_image(container: Container, tenant: str, name: str) -> bytes:
    image = await container.services.images.open(tenant, name, Newest())
    try:
        pieces = image.content(0, image.size_bytes)
        return b"".join([bytes(piece) async for piece in pieces])
    finally:
        image.release()


@dataclass
class Picture:
    """What one libsql database must hold: its newest image, or, after an answer that was lost, that
    one or the one before.
    """

    tenant: str
    name: str
    images: list[bytes] = field(default_factory=lambda: [b""])
    made: bool = False
    turns: int = 0

    def check(self, found: bytes) -> None:
        if found not in self.images:
            raise Violation(f"{self.name} reads as no image that was put: {len(found)} bytes")


Database = Ledger | Picture


async def read_content(
    container: Container, database: Database, name: str
) -> dict[int, bytes] | bytes:
    """Of the database, or of a fork of it."""
    if isinstance(database, Picture):
        return await read_image(container, database.tenant, name)
    return await read_all(container, database.tenant, name)


@dataclass
class Crowd:
    source: random.Random
    ledgers: list[Ledger]
    picture: Picture
    done: "Counter[str]" = field(default_factory=Counter)
    forks: dict[str, tuple[Database, dict[int, bytes] | bytes]] = field(default_factory=dict)
    """Their names, whose they are, and what they first read as."""
    snapshots: set[tuple[str, str, str]] = field(default_factory=set)
    names: int = 0
    corrupt_allowed: Callable[[], bool] = lambda: False

    # --- the writer

    async def write(
        self, container: Container, ledger: Ledger, is_dead: Callable[[], bool]
    ) -> None:
        """For ever. What is not answered before a kill stays `unanswered`."""
        await self.settle(container, ledger, is_dead)
        while True:
            await self._pause()
            step = self.source.choices(
                [self._append, self._read, self._truncate_head, self._truncate_tail],
                [70, 20, 4, 4],
            )[0]
            await step(container, ledger, is_dead)

    async def settle(
        self, container: Container, ledger: Ledger, is_dead: Callable[[], bool]
    ) -> None:
        """Finds out what became of the call that a kill left unanswered."""
        services = container.services
        if not ledger.made:
            spec = DatabaseSpec(
                engine="append_only",
                chunk_bytes=CHUNK_BYTES,
                compression=self.source.choice(["none", "zstd"]),
            )
            with suppress(Conflict):  # made by the call that was not answered, with the other codec
                await services.databases.create(ledger.tenant, ledger.name, spec)
            ledger.made = True
        while jobs := services.jobs.list(
            tenant=ledger.tenant, database=ledger.name, kinds=["truncate_append_only"],
            states=["pending", "in_flight"], limit=1, after=None,
        ):  # fmt: skip
            await services.jobs.wait(jobs[0].job_id, seconds=3600)
        while ledger.unanswered is not None and not is_dead():
            if await self._resolve(container, ledger, ledger.unanswered, is_dead):
                ledger.unanswered = None
            else:
                await asyncio.sleep(60)
        status = services.databases.get(ledger.tenant, ledger.name)
        if not is_dead() and (status.health, status.next_lsn) != ("ok", ledger.next_lsn):
            raise Violation(
                f"{ledger.name} is {status.health} and goes on at {status.next_lsn}, "
                f"not {ledger.next_lsn}"
            )

    async def _resolve(
        self,
        container: Container,
        ledger: Ledger,
        call: Unanswered,
        is_dead: Callable[[], bool],
    ) -> bool:
        """False, where it cannot be known yet."""
        status = container.services.databases.get(ledger.tenant, ledger.name)
        if call.head is not None:
            ledger.cut_head(status.first_lsn, asked=call.head)
        elif call.tail is not None:
            found = await self._whole(container, ledger)
            if found is None or is_dead():
                return False
            if found.keys() != ledger.records.keys():
                ledger.cut_tail(call.tail)
            ledger.check(found)
        elif call.key is None:
            if status.next_lsn != ledger.next_lsn:
                ledger.add(call.payloads)
        else:
            try:
                appended = await self._send(container, ledger, call)
            except (Backpressure, QuotaExhausted):
                return False
            if is_dead():
                return False
            ledger.take(appended, call.payloads)
        return True

    async def _append(
        self, container: Container, ledger: Ledger, is_dead: Callable[[], bool]
    ) -> None:
        count = self.source.choice([1, 1, 2, 5, 20])
        payloads = [
            self.source.randbytes(8) + b"x" * self.source.choice([0, 100, 3000, 12_000])
            for _ in range(count)
        ]
        key = self.source.randbytes(16) if self.source.random() < 0.4 else None
        call = Unanswered(payloads=payloads, key=key)
        if self.source.random() < 0.1:
            await self._append_elsewhere(container, ledger, payloads)
        ledger.unanswered = call
        try:
            appended = await self._send(container, ledger, call)
        except (Backpressure, QuotaExhausted):
            if not is_dead():
                ledger.unanswered = None
                self.done["refused"] += 1
            return
        if is_dead():
            return
        ledger.unanswered = None
        ledger.take(appended, payloads)
        self.done["append"] += 1
        if key is not None and self.source.random() < 0.2:
            again = await self._send(container, ledger, call)
            if (again.first_lsn, again.replayed) != (appended.first_lsn, True):
                raise Violation(f"an append of {ledger.name} happened twice: {again}")

    async def _append_elsewhere(
        self, container: Container, ledger: Ledger, payloads: list[bytes]
    ) -> None:
        """With the wrong `If-Match`: it must have no effect."""
        wrong = ledger.next_lsn + self.source.choice([-1, 1, 7])
        try:
            await container.services.records.append(
                ledger.tenant, ledger.name, [_entry(payloads)],
                expected_next_lsn=wrong, key_hash=None, body_hash=None,
            )  # fmt: skip
        except (LsnMismatch, Backpressure, QuotaExhausted):
            self.done["mismatch"] += 1
        else:
            raise Violation(f"an append at {wrong} was taken at {ledger.next_lsn}")

    async def _send(self, container: Container, ledger: Ledger, call: Unanswered) -> Appended:
        entry = _entry(call.payloads)
        return await container.services.records.append(
            ledger.tenant,
            ledger.name,
            [entry],
            expected_next_lsn=ledger.next_lsn if call.key is None else None,
            key_hash=call.key,
            body_hash=blake2b(entry.payload, digest_size=16).digest() if call.key else None,
        )

    async def _read(
        self, container: Container, ledger: Ledger, is_dead: Callable[[], bool]
    ) -> None:
        found = await self._whole(container, ledger)
        if found is not None and not is_dead():
            ledger.check(found)
            self.done["read"] += 1

    async def _whole(self, container: Container, ledger: Ledger) -> dict[int, bytes] | None:
        """None, where the bucket stands in the way."""
        try:
            return await read_all(container, ledger.tenant, ledger.name)
        except Unavailable:
            return None
        except CorruptBlob:
            if not self.corrupt_allowed():
                raise
            return None

    async def _truncate_head(
        self, container: Container, ledger: Ledger, is_dead: Callable[[], bool]
    ) -> None:
        if ledger.records:
            lsn = self.source.randint(min(ledger.records), ledger.next_lsn)
            await self._truncate(container, ledger, is_dead, Unanswered(head=lsn))

    async def _truncate_tail(
        self, container: Container, ledger: Ledger, is_dead: Callable[[], bool]
    ) -> None:
        if ledger.records:
            newest = sorted(ledger.records)[-30:]
            await self._truncate(
                container, ledger, is_dead, Unanswered(tail=self.source.choice(newest))
            )

    async def _truncate(
        self, container: Container, ledger: Ledger, is_dead: Callable[[], bool], call: Unanswered
    ) -> None:
        services, ledger.unanswered = container.services, call
        lsn = call.head if call.head is not None else call.tail
        assert lsn is not None
        try:
            job = await services.truncations.request(
                ledger.tenant,
                ledger.name,
                direction="head" if call.head is not None else "tail",
                lsn=lsn,
                on_lease=self.source.choice(["wait", "cancel"]),
                lease_timeout_seconds=30,
                principal="writer",
            )
            job = await services.jobs.wait(job.job_id, seconds=24 * 3600)
        except (LsnOutOfRange, LsnTruncated, RowPinned, Backpressure, Conflict):
            if not is_dead():
                ledger.unanswered = None
                self.done["truncation refused"] += 1
            return
        if is_dead():
            return
        ledger.unanswered = None
        if job.state != "completed":
            if job.state not in {"failed", "cancelled"}:
                raise Violation(f"a truncation is {job.state} after a day")
            self.done["truncation failed"] += 1
            return
        self.done["truncation"] += 1
        first = services.databases.get(ledger.tenant, ledger.name).first_lsn
        if call.tail is not None:
            ledger.cut_tail(call.tail)
        else:
            ledger.cut_head(first, asked=lsn)

    # --- the painter

    async def paint(self, container: Container, is_dead: Callable[[], bool]) -> None:
        """For ever: images, most of them little different from the one before, read back."""
        picture = self.picture
        await self.settle_picture(container)
        while True:
            await self._pause()
            image = sqlite_image(self.source, picture.images[-1] or None)
            picture.images.append(image)
            try:
                await container.services.pages_in.put_image(
                    picture.tenant, picture.name, HeldBody(bytearray(image)), place=None
                )
            except (Backpressure, QuotaExhausted, Unavailable, CorruptBlob):
                if not is_dead():
                    picture.images.pop()
                continue
            if is_dead():
                return
            picture.images, picture.turns = [image], picture.turns + 1
            self.done["image"] += 1
            try:
                picture.check(await read_image(container, picture.tenant, picture.name))
            except (Unavailable, CorruptBlob):
                continue  # the bucket stands in the way

    async def settle_picture(self, container: Container) -> None:
        picture = self.picture
        if not picture.made:
            spec = DatabaseSpec(engine="libsql", page_size=PAGE, chunk_bytes=CHUNK_BYTES)
            await container.services.databases.create(picture.tenant, picture.name, spec)
            picture.made = True
        while len(picture.images) > 1:
            try:
                found = await read_image(container, picture.tenant, picture.name)
            except (Unavailable, CorruptBlob):
                await asyncio.sleep(60)
                continue
            picture.check(found)
            picture.images = [found]

    # --- everybody else

    async def meddle(self, container: Container, is_dead: Callable[[], bool]) -> None:
        """For ever."""
        steps: list[tuple[Callable[[Container, Database], Awaitable[None]], int]] = [
            (self._checkpoint, 30), (self._cancel, 10), (self._snapshot, 8), (self._unsnap, 5),
            (self._fork, 5), (self._unfork, 4), (self._collect, 8), (self._retain, 4),
            (self._look, 10), (self._tidy, 3),
        ]  # fmt: skip
        while True:
            await self._pause()
            ledger = self.source.choice([*self.ledgers, self.picture])
            step = self.source.choices([one for one, _ in steps], [weight for _, weight in steps])
            try:
                await step[0](container, ledger)
                self.done[step[0].__name__.strip("_")] += 1
            except (Conflict, NotFound, GenerationExpired, LsnTruncated, Unavailable, Backpressure):
                self.done["meddling refused"] += 1
            except CorruptBlob:
                if not self.corrupt_allowed():
                    raise
            except RowPinned:
                self.done["meddling refused"] += 1

    async def _checkpoint(self, container: Container, ledger: Database) -> None:
        services = container.services
        job = await services.checkpoints.trigger(
            ledger.tenant, ledger.name, reason=None, principal="someone"
        )
        if self.source.random() < 0.5:
            await services.jobs.wait(job.job_id, seconds=600)

    async def _cancel(self, container: Container, ledger: Database) -> None:
        del ledger
        jobs = container.services.jobs.list(
            states=["pending", "in_flight"], limit=10, after=None,
            kinds=["create_checkpoint", "coalesce_chunks"],
        )  # fmt: skip
        if jobs:
            try:
                await container.services.jobs.cancel(self.source.choice(jobs).job_id)
            except JobAlreadyEnded:
                return

    async def _snapshot(self, container: Container, ledger: Database) -> None:
        self.names += 1
        name = f"s{self.names}"
        await container.services.snapshots.create(ledger.tenant, ledger.name, name)
        self.snapshots.add((ledger.tenant, ledger.name, name))

    async def _unsnap(self, container: Container, ledger: Database) -> None:
        del ledger
        if self.snapshots:
            gone = self.source.choice(sorted(self.snapshots))
            self.snapshots.discard(gone)
            await container.services.snapshots.delete(*gone)

    async def _fork(self, container: Container, ledger: Database) -> None:
        """Of a published generation: what it holds is never changed by what comes after."""
        self.names += 1
        name = f"fork{self.names}"
        await container.services.forks.create(
            ledger.tenant, ledger.name, fork_tenant=ledger.tenant, fork_database=name
        )
        found = await read_content(container, ledger, name)
        if isinstance(ledger, Ledger) and isinstance(found, dict):
            for lsn, payload in found.items():
                if ledger.history.get(lsn) != payload:
                    raise Violation(f"{name} reads LSN {lsn} unlike {ledger.name}")
        self.forks[name] = ledger, found

    async def _unfork(self, container: Container, ledger: Database) -> None:
        del ledger
        if self.forks:
            name = self.source.choice(sorted(self.forks))
            parent, _ = self.forks.pop(name)
            await container.services.deletion.delete(
                parent.tenant, name, with_snapshots=True, principal="someone"
            )

    async def _collect(self, container: Container, ledger: Database) -> None:
        del ledger
        await container.services.collection.run(
            RoundRequest(
                everything=self.source.random() < 0.5,
                accept_clock=self.source.random() < 0.3,
                orphans=self.source.choice([None, "delete"]),
            )
        )

    async def _retain(self, container: Container, ledger: Database) -> None:
        keep = Retention(
            keep_generations=self.source.choice([None, 1, 5]),
            keep_seconds=self.source.choice([None, 0, 600, 86_400]),
            minimum_generations=self.source.choice([1, 2]),
        )
        await container.services.history.set_retention(
            ledger.tenant, ledger.name, lambda before: keep
        )

    async def _look(self, container: Container, ledger: Database) -> None:
        """A reader beside the writer: what it sees was acknowledged, and is where it belongs."""
        if isinstance(ledger, Picture):
            await read_image(container, ledger.tenant, ledger.name)
            return
        turns, before = ledger.turns, dict(ledger.records)
        found = await read_all(container, ledger.tenant, ledger.name)
        pending = ledger.unanswered is not None
        if turns == ledger.turns and not pending and found != before:
            ledger.check(found)
        for lsn, payload in found.items():
            if lsn in ledger.history and ledger.history[lsn] != payload:
                raise Violation(f"LSN {lsn} of {ledger.name} reads as another record")

    async def _tidy(self, container: Container, ledger: Database) -> None:
        del ledger
        await container.services.upkeep.run_janitor(max_age_seconds=600)

    async def _pause(self) -> None:
        mean = self.source.choices([2.0, 60.0, 1800.0], [70, 25, 5])[0]
        await asyncio.sleep(self.source.expovariate(1 / mean))


def _entry(payloads: list[bytes]) -> MemoryPayload:
    framed = b"".join(_LENGTH.pack(len(one)) + one for one in payloads)
    return MemoryPayload(payload=framed, count=len(payloads), line_safe=False)
