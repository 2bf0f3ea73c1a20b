"""Pages into libsql databases: WAL bytes, whole images.

Invariants: I1: an answer says that its frames are durable. I5: what is stored ends on a commit.
I13: a body is verified from end to end before any of it is stored; what is refused leaves nothing.
I11: a body's pages are read where it was spooled, a block at a time; the first image of a database
is spooled into what will be its log's files.
Concurrency: a database takes one body at a time, since where a log goes on is decided by what was
stored before; the bodies have arrived by then, so a slow client holds up nobody.
Cancellation: what was handed to the log is waited for, so that the next body sees it.
Crash: a request is wholly there or not at all, and its footer with it: a client that had no answer
sends its bytes again, and what is stored is recognised.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

from app.core.base.errors import (
    CorruptWal,
    InternalError,
    InvalidRequest,
    PageSizeMismatch,
    WalGap,
    WalInvalid,
    WalLost,
)
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, uninterrupted
from app.core.formats import sqlite_wal_ingestion as ingestion
from app.core.formats.damage import Damage
from app.core.formats.frame_run import FrameFooter
from app.core.formats.segment import EntryType
from app.core.formats.sqlite_wal import WalPosition, Words, is_frame_boundary
from app.core.formats.sqlite_wal_ingestion import (
    AcceptFrom,
    AlreadyStored,
    IngestionState,
    NothingWhole,
)
from app.core.formats.sqlite_wal_scanner import ScanEnd
from app.core.reads.page_store import PageRun
from app.core.reads.read_point import ReadPoint
from app.core.services.directory import DatabaseDirectory
from app.core.services.image_body import (
    changed_pages,
    check_image_head,
    differing_blocking,
    image_pages,
    page_count_blocking,
    plan_image,
)
from app.core.services.image_draft import ImageDraft
from app.core.services.page_payloads import Body, FramesPayload
from app.core.services.page_state import PageState, content_tag, page_state
from app.core.services.wal_body import frames_max, plan_frames, scan_blocking
from app.core.stores.manifest.records import DatabaseRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.log import WalLog
from app.core.stores.wal.requests import Appended, AppendRequest


class StoredContent(Protocol):
    """What is stored of a database (reads/page_store.py)."""

    async def point(self, db_id: int) -> ReadPoint:
        """The newest committed state, to be released."""
        ...

    def iter_pages(self, point: ReadPoint, first: int, last: int) -> AsyncGenerator[PageRun, None]:
        """In order, in runs that fit into memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPlace:
    """Where in the application's log an image stands, as its sender says."""

    offset: int
    salt1: int
    salt2: int
    checksum1: int
    checksum2: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WalStored:
    """`accepted_offset` is where the log with these salts goes on; 0 where nothing of it is
    stored. LSNs are None where nothing new was.
    """

    accepted_offset: int
    salts: tuple[int, int] | None
    frames: int
    commits: int
    page_count: int
    first_lsn: int | None = None
    last_lsn: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageStored:
    lsn: int
    page_count: int
    changed_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentState:
    tag: str
    """As `Image.tag`."""
    is_empty: bool


Condition = Callable[[ContentState], None]


class PagesIn:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: DatabaseDirectory,
        content: StoredContent,
        *,
        pool: BlockingPool,
        events: Events,
        wal_budget_bytes: int,
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._content = content
        self._pool = pool
        self._events = events
        self._budget_bytes = wal_budget_bytes
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    def check_writable(self, tenant: str, name: str) -> int:
        """Before a body is read: the page size of what would take it. Raises DatabaseNotFound,
        WrongEngine, WalLost, CorruptWal.
        """
        record, log = self._directory.require(tenant, name, "libsql")
        if log.health == "wal_lost":
            raise WalLost(lost_from_lsn=log.lost_from_lsn)
        if log.health == "corrupt_wal":
            raise CorruptWal
        return record.page_size

    # --- WAL ----------------------------------------------------------------------------------

    async def append_wal(
        self, tenant: str, name: str, body: Body, *, offset: int, after_lsn: int | None
    ) -> WalStored:
        """Stores the body up to its last commit, durably (I1). Raises WalGap, WalInvalid,
        PageSizeMismatch, TransactionTooLarge, DiskFull, Backpressure.
        """
        record, log = self._directory.require(tenant, name, "libsql")
        async with self._turn(record.db_id):
            record, state = self._state(tenant, name, log)
            known = _ingestion_state(record, state)
            head_bytes = min(ingestion.HEAD_BYTES, body.size_bytes)
            head = await self._pool.run(body.read_blocking, 0, head_bytes)  # perhaps of a file
            request = ingestion.WalRequest(
                offset=offset,
                head=bytes(head),
                after_lsn=after_lsn,
                body_bytes=body.size_bytes,
            )
            try:
                decided = ingestion.decide_ingestion(known, request)
            except Damage as damage:
                raise WalInvalid(f"{damage}.", frame=0) from damage
            match decided:
                case AcceptFrom():
                    return await self._accept(log, body, decided, known, state)
                case AlreadyStored(position=at):
                    return _nothing_new(at.offset, at, state)
                case NothingWhole(offset=at_offset, position=position):
                    return _nothing_new(at_offset, position, state)
                case ingestion.WalGap():
                    raise _gap(known)
                case ingestion.PageSizeMismatch(stored=stored, sent=sent):
                    raise PageSizeMismatch(
                        f"The log has pages of {sent} bytes, the database of {stored}.",
                        stored=stored,
                        sent=sent,
                    )

    async def _accept(
        self,
        log: WalLog,
        body: Body,
        accept: AcceptFrom,
        known: IngestionState,
        state: PageState,
    ) -> WalStored:
        scanned = await self._pool.run(scan_blocking, body, accept)
        result = scanned.result
        if result.end is ScanEnd.GAP:
            raise _gap(known)
        if result.end is ScanEnd.INVALID:
            raise WalInvalid(
                f"Frame {result.frame} fails its checksum, but a commit that builds on what "
                "follows it is there.",
                frame=result.frame,
            )
        goes_on = accept.position == known.position
        if not result.frames:
            at = accept.position
            return _nothing_new(at.offset if goes_on else 0, at, state)
        before = state.footer
        replaced = before.replaced if goes_on else before.position or before.replaced
        planned = await self._pool.run(
            lambda: plan_frames(
                body, scanned, accept, replaced=replaced, budget_bytes=self._budget_bytes
            )
        )
        appended = await self._append(log, planned.entries)
        self._events.debug(
            "wal.frames_stored", db_id=log.db_id, frames=appended.count, commits=planned.commits,
            last_lsn=appended.last_lsn,
        )  # fmt: skip
        return WalStored(
            accepted_offset=planned.position.offset,
            salts=planned.position.salts,
            frames=appended.count,
            commits=planned.commits,
            page_count=planned.page_count,
            first_lsn=appended.first_lsn,
            last_lsn=appended.last_lsn,
        )

    # --- images -------------------------------------------------------------------------------

    def check_image_head(self, head: bytes, *, page_size: int) -> None:
        """While the body still arrives. Raises ImageInvalid, PageSizeMismatch."""
        check_image_head(head, page_size=page_size)

    async def draft_image(
        self, tenant: str, name: str, head: bytes, *, size_bytes: int, place: LogPlace | None
    ) -> ImageDraft | None:
        """For an image of `size_bytes` of which the head has arrived: where the rest may go, if
        nothing is stored yet. Raises ImageInvalid, PageSizeMismatch, InvalidRequest,
        TransactionTooLarge.
        """
        _, log = self._directory.require(tenant, name, "libsql")
        record, state = self._state(tenant, name, log)
        if state.last_lsn:
            return None
        position = _position(place, page_size=record.page_size)
        page_count = image_pages(head, size_bytes=size_bytes, page_size=record.page_size)
        footer = _footer(state, page_count=page_count, position=position)
        image = await self._pool.run(
            lambda: ImageDraft(
                size_bytes, page_size=record.page_size, footer=footer,
                budget_bytes=self._budget_bytes,
            )
        )  # fmt: skip
        draft = await log.draft(image.request)
        if draft is None:
            return None
        image.begin(draft)
        return image

    def content_state(self, tenant: str, name: str) -> ContentState:
        """What is stored now."""
        _, log = self._directory.require(tenant, name, "libsql")
        return _content_state(*self._state(tenant, name, log))

    async def put_image(
        self,
        tenant: str,
        name: str,
        body: Body,
        *,
        place: LogPlace | None,
        condition: Condition = lambda _: None,
    ) -> ImageStored:
        """Makes the body the content, in one commit, durably (I1): the pages that differ are
        stored. `condition` is given what it replaces, and may raise. Raises ImageInvalid,
        PageSizeMismatch, InvalidRequest, TransactionTooLarge, DiskFull, Backpressure.
        """
        record, log = self._directory.require(tenant, name, "libsql")
        page_size = record.page_size
        position = _position(place, page_size=page_size)
        page_count = await self._pool.run(lambda: page_count_blocking(body, page_size=page_size))
        async with self._turn(record.db_id):
            record, state = self._state(tenant, name, log)
            condition(_content_state(record, state))
            pages = await self._changed(
                record.db_id, body, page_count=page_count, page_size=page_size
            )
            footer = _footer(state, page_count=page_count, position=position)
            if isinstance(body, ImageDraft) and body.holds(pages, footer):
                request, draft = body.request, body.draft
            else:
                entries = await self._pool.run(
                    lambda: plan_image(
                        body, pages, page_size=page_size, footer=footer,
                        budget_bytes=self._budget_bytes,
                    )
                )  # fmt: skip
                request, draft = AppendRequest(entries=entries, entry_type=EntryType.FRAMES), None
            appended = await uninterrupted(log.append(request, draft=draft))
        self._events.info(
            "image.stored", tenant=tenant, database=name, lsn=appended.last_lsn,
            page_count=page_count, changed_pages=appended.count,
        )  # fmt: skip
        return ImageStored(
            lsn=appended.last_lsn, page_count=page_count, changed_pages=appended.count
        )

    async def _changed(self, db_id: int, body: Body, *, page_count: int, page_size: int) -> Words:
        """The pages that differ from what is stored, in order; no more of them are looked for than
        can be stored.
        """
        most = frames_max(self._budget_bytes, page_size)
        found: list[Words] = []
        with await self._content.point(db_id) as point:
            compared = min(page_count, point.page_count)
            count = page_count - compared
            if compared and count <= most:
                async with aclosing(self._content.iter_pages(point, 1, compared)) as runs:
                    async for run in runs:
                        differing = await self._pool.run(_differing_blocking, body, run, page_size)
                        found.append(differing)
                        count += len(differing)
                        if count > most:
                            break
        if count > most:
            compared = max(compared, page_count - most - 1)  # refused; how many is of no matter
        return changed_pages(found, page_count=page_count, compared=compared, page_size=page_size)

    # --- both ---------------------------------------------------------------------------------

    def _turn(self, db_id: int) -> asyncio.Lock:
        return self._turns.setdefault(db_id, asyncio.Lock())

    def _state(self, tenant: str, name: str, log: WalLog) -> tuple[DatabaseRecord, PageState]:
        self.check_writable(tenant, name)
        record = self._directory.read(tenant, name)
        try:
            with self._manifest.read() as view:
                return record, page_state(view, record, log)
        except Damage as damage:
            raise InternalError(f"The database's row holds no WAL position: {damage}") from damage

    async def _append(self, log: WalLog, entries: Sequence[FramesPayload]) -> Appended:
        request = AppendRequest(entries=entries, entry_type=EntryType.FRAMES)
        return await uninterrupted(log.append(request))


def _content_state(record: DatabaseRecord, state: PageState) -> ContentState:
    tag = content_tag(record.db_id, state.last_lsn)
    return ContentState(tag=tag, is_empty=state.page_count == 0)


def _footer(state: PageState, *, page_count: int, position: WalPosition | None) -> FrameFooter:
    """What an image at that place of the application's log leaves."""
    before = state.footer
    goes_on = (
        position is not None
        and before.position is not None
        and position.salts == before.position.salts
    )
    return FrameFooter(
        page_count=page_count,
        position=position,
        replaced=before.replaced if goes_on else before.position or before.replaced,
    )


def _ingestion_state(record: DatabaseRecord, state: PageState) -> IngestionState:
    replaced = state.footer.replaced
    return IngestionState(
        page_size=record.page_size,
        last_lsn=state.last_lsn or None,
        position=state.footer.position,
        replaced_logs=(replaced,) if replaced is not None else (),
    )


def _nothing_new(offset: int, position: WalPosition | None, state: PageState) -> WalStored:
    return WalStored(
        accepted_offset=offset,
        salts=position.salts if position is not None else None,
        frames=0,
        commits=0,
        page_count=state.page_count,
    )


def _gap(known: IngestionState) -> WalGap:
    gap = ingestion.wal_gap(known)
    at = gap.position
    if at is not None:
        told = "The log does not go on where what is stored ends."
    elif gap.last_lsn is None:
        told = "Nothing is stored: a log begins with offset=0, and without after_lsn."
    else:
        told = (
            f"What is stored ends with LSN {gap.last_lsn}, at no known place of a log; only a log "
            f"that starts from exactly that state goes on, with offset=0&after_lsn={gap.last_lsn}."
        )
    return WalGap(
        told,
        last_lsn=gap.last_lsn or 0,
        offset=at.offset if at else None,
        salt1=at.salt1 if at else None,
        salt2=at.salt2 if at else None,
        checksum1=at.checksum1 if at else None,
        checksum2=at.checksum2 if at else None,
    )


def _position(place: LogPlace | None, *, page_size: int) -> WalPosition | None:
    """Raises InvalidRequest."""
    if place is None:
        return None
    if not is_frame_boundary(place.offset, page_size=page_size):
        raise InvalidRequest(
            f"offset {place.offset} is no boundary of {page_size}-byte pages' frames.",
            offset=place.offset,
        )
    return WalPosition(
        offset=place.offset, salt1=place.salt1, salt2=place.salt2, checksum1=place.checksum1,
        checksum2=place.checksum2, page_size=page_size,
    )  # fmt: skip


def _differing_blocking(body: Body, run: PageRun, page_size: int) -> Words:
    return differing_blocking(
        body, first=run.first, count=run.count, stored=run.data, page_size=page_size
    )
