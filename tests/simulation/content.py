"""What a database must hold, and reading it whole."""

import struct
from dataclasses import dataclass, field

from app.container.service import Container
from app.core.services.states import Newest
from app.core.stores.wal.requests import Appended
from tests.simulation.app_log import AppLog
from tests.simulation.bucket import Violation

_LENGTH = struct.Struct("<I")
Content = dict[int, bytes] | bytes


@dataclass(kw_only=True)
class Unanswered:
    """An append or a truncation of which nobody knows."""

    payloads: list[bytes] = field(default_factory=list)
    key: bytes | None = None
    head: int | None = None
    tail: int | None = None


@dataclass
class Ledger:
    """What one append_only database must hold."""

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

    def check(self, found: Content) -> None:
        assert isinstance(found, dict)
        if found != self.records:
            missing = sorted(self.records.keys() - found.keys())
            extra = sorted(found.keys() - self.records.keys())
            raise Violation(
                f"{self.tenant}/{self.name} reads wrong: missing {missing[:10]}, extra "
                f"{extra[:10]} of {len(self.records)}, LSNs {self.first_lsn}..{self.next_lsn - 1}"
            )

    def check_past(self, found: Content) -> None:
        """Of any generation, fork or moment: what it shows was acknowledged, and at that LSN. A
        record that is being appended may show before its writer is told.
        """
        assert isinstance(found, dict)
        for lsn, payload in found.items():
            if lsn in self.history and self.history[lsn] != payload:
                raise Violation(f"LSN {lsn} of {self.name} reads as another record")


@dataclass
class Picture:
    """What one libsql database must hold: its newest state, or, after an answer that was lost, that
    one or the one before. And the application that it belongs to, which lives on over kills.
    """

    tenant: str
    name: str
    images: list[bytes] = field(default_factory=lambda: [b""])
    made: bool = False
    turns: int = 0
    history: set[bytes] = field(default_factory=lambda: {b""})
    """Every state that it ever was to have."""
    app: bytes = b""
    """The application's file, log included: ahead of what is stored."""
    log: AppLog | None = None
    accepted: int = 0
    """Up to where the log is stored."""
    last_lsn: int = 0
    unanswered: tuple[bytes, int, int, int | None] | None = None
    """Of a log: body, offset, where it is to be accepted up to, and `after_lsn`."""

    def hope(self, image: bytes) -> None:
        """It is on its way."""
        self.images.append(image)
        self.history.add(image)

    def settle(self, image: bytes) -> None:
        self.images, self.turns, self.unanswered = [image], self.turns + 1, None

    def check(self, found: Content) -> None:
        assert isinstance(found, bytes)
        if found not in self.images:
            raise Violation(f"{self.name} reads as no image that was put: {len(found)} bytes")

    def check_past(self, found: Content) -> None:
        assert isinstance(found, bytes)
        if found not in self.history:
            raise Violation(f"{self.name} reads as it never was: {len(found)} bytes")


Database = Ledger | Picture


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
        if body:
            assert stream.first_lsn is not None
            found.update(enumerate(unpacked(body), stream.first_lsn))
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


async def read_content(container: Container, database: Database, name: str) -> Content:
    """Of the database, or of a fork of it."""
    if isinstance(database, Picture):
        return await read_image(container, database.tenant, name)
    return await read_all(container, database.tenant, name)


def packed(payloads: list[bytes]) -> bytes:
    return b"".join(_LENGTH.pack(len(one)) + one for one in payloads)


def unpacked(body: bytes) -> list[bytes]:
    payloads, offset = [], 0
    while offset < len(body):
        (length,) = _LENGTH.unpack_from(body, offset)
        offset += _LENGTH.size + length
        payloads.append(body[offset - length : offset])
    return payloads
