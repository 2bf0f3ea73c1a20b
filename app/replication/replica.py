"""A database as the service has it: how far it is, what is sent to it, what its refusals mean.

Invariants: `position` is what the service answered, and None from the moment that something is sent
until there is an answer: what became of it is not known. `confirmed` is never beyond what it has.
Concurrency: used by one follower, one call at a time. Cancellation: leaves `position` None.
Crash: nothing is kept; whoever follows next asks the service.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from app.client import BopClient, ProblemError, UnexpectedAnswer
from app.client.libsql import wal_position
from app.client.wire import ImageStored, WalPosition, WalStored
from app.replication.events import Event, Kind, Status, Tell
from app.replication.plan import Limits, Position
from app.replication.shares import Shares
from app.replication.wal_index import LOG_HEADER_BYTES, Log, Salts, log_header

Body = bytes | Callable[[], AsyncIterator[bytes]]

NO_LOG: Salts = (0x626F7021, 0x3F3F3F3F)
"""Salts that ask: a log that the service cannot have gives its position in the refusal."""
AWAY_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
AWAY_SECONDS_MAX = 60.0
"""However long it asks for: it may be a proxy that does, of a service that is back before."""
GAPS_MAX = 3
"""Refusals in a row without a frame stored, until an image is sent."""

PATIENCE_SECONDS = 60.0
"""How long who does not stay waits for it."""
REQUEST_BYTES_MIN = 256 * 1024
"""What is too large for the service, or for a proxy before it, is halved down to this."""

_LATER = frozenset({408, 425, 429, 500, 502, 503, 504, 507})
_NEEDS_IMAGE = {
    "wal_invalid": "the service could not read the log",
    "transaction_too_large": "a transaction is longer than the service takes as WAL",
    "body_too_large": "a transaction is longer than the service takes as WAL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    path: Path
    tenant: str
    database: str

    @property
    def name(self) -> str:
        return f"{self.tenant}/{self.database}"


class Refused(Exception):
    """The database cannot be followed until someone changes something; its cause may be a problem
    that the service told.
    """

    def __init__(self, detail: str, *, code: str) -> None:
        self.code = code
        super().__init__(detail)


class Replica:
    def __init__(
        self, target: Target, client: BopClient, *, tell: Tell, limits: Limits, shares: Shares
    ) -> None:
        self.status = Status()
        self.position: Position | None = None
        self.confirmed: Position | None = None
        """Until `forget`: the last place that it said it has."""
        self.image_reason: str | None = None
        """Why it has to be sent an image, once it has to."""
        self._target = target
        self._client = client
        self._tell = tell
        self._limits = limits
        self._shares = shares
        self._request_bytes = limits.request_bytes
        self._request_bytes_max = limits.request_bytes_max
        self._asked_bytes = 0
        self._made_page_size: int | None = None
        self._away_count = 0
        self._away_since = self._away_until = 0.0
        self._gap_count = 0

    # --- how far it is

    @property
    def is_away(self) -> bool:
        """It did not answer, and it is not yet time to ask again."""
        return self._away_count > 0 and self._now() < self._away_until

    @property
    def away_seconds(self) -> float:
        return max(0.0, self._away_until - self._now())

    @property
    def is_given_up(self) -> bool:
        """For who does not stay: it was asked as often as there are waits, or wants longer ones."""
        too_long = self._away_until - self._away_since > PATIENCE_SECONDS
        return self._away_count > len(AWAY_SECONDS) or (self._away_count > 1 and too_long)

    def forget(self, image_reason: str | None = None) -> None:
        """What is known of it; with a reason, it needs an image."""
        self.position = self.confirmed = None
        self._made_page_size = None
        self.image_reason = image_reason or self.image_reason

    async def ask_position(self, log: Log) -> None:
        """Makes the database where it is missing, and asks how far it is."""
        async with self._shares.requests:
            position = await self._asked_position(log)
        is_further = position.last_lsn > self.status.last_lsn  # an answer was lost
        self._settle_position(position)
        if is_further:
            self.come_back()

    async def _asked_position(self, log: Log) -> WalPosition:
        tenant, name = self._target.tenant, self._target.database
        if self._made_page_size != log.page_size:
            await self._client.databases.create(
                tenant, name, engine="libsql", page_size=log.page_size
            )
            self._made_page_size = log.page_size
        found = await self._client.databases.get(tenant, name)
        position = WalPosition(last_lsn=found.next_lsn - 1)
        if found.next_lsn > 1:
            question = log_header(page_size=log.page_size, salts=NO_LOG)
            try:
                await self._client.libsql.push_wal(
                    tenant, name, question, content_bytes=len(question), offset=0
                )
            except ProblemError as problem:
                if problem.code != "wal_gap":
                    raise
                position = wal_position(problem)
        return position

    def _settle_position(self, answer: WalPosition) -> None:
        """What the service says, joined with what is known here: the same LSN is the same state."""
        self.status.last_lsn = answer.last_lsn
        salts = checksums = None
        if answer.salt1 is not None and answer.salt2 is not None and answer.offset:
            salts = (answer.salt1, answer.salt2)
        if answer.checksum1 is not None and answer.checksum2 is not None:
            checksums = (answer.checksum1, answer.checksum2)
        known = self.confirmed
        if salts is None and known is not None and known.last_lsn == answer.last_lsn:
            self.position = known
            return
        self.position = Position(
            last_lsn=answer.last_lsn,
            salts=salts,
            offset=answer.offset or 0,
            checksums=checksums,
        )

    def _confirm(self, position: Position) -> None:
        self.position = self.confirmed = position
        self.status.last_lsn = position.last_lsn
        self._gap_count = 0
        self.come_back()

    # --- what is sent to it

    def request_end(self, log: Log, offset: int, end: int) -> int:
        """The frame boundary that a request from `offset` goes to: behind one frame at least, and
        not beyond `end`.
        """
        first = offset or LOG_HEADER_BYTES
        frames = max(1, self._request_bytes // log.frame_bytes)
        return min(end, first + frames * log.frame_bytes)

    async def send_wal(
        self, body: Body, *, offset: int, end: int, log_end: int, after_lsn: int | None
    ) -> bool:
        """Frames up to `end` of a log that ends at `log_end`; whether any of them was new. Where a
        transaction does not end within them, the next request is longer.
        """
        stored = await self._send_frames(
            body, content_bytes=end - offset, offset=offset, after_lsn=after_lsn
        )
        if stored.accepted_offset > max(offset, LOG_HEADER_BYTES):
            self._request_bytes = min(self._limits.request_bytes, self._request_bytes_max)
        elif end < log_end and self._request_bytes < self._request_bytes_max:
            self._request_bytes = min(2 * self._request_bytes, self._request_bytes_max)
        else:
            self._gap("the service takes no frame of the log")
        return stored.last_lsn is not None

    async def _send_frames(
        self, body: Body, *, content_bytes: int, offset: int, after_lsn: int | None
    ) -> WalStored:
        before, self.position = self.position, None
        self._asked_bytes = content_bytes
        async with self._shares.requests:
            stored = await self._client.libsql.push_wal(
                self._target.tenant,
                self._target.database,
                body,
                content_bytes=content_bytes,
                offset=offset,
                after_lsn=after_lsn,
            )
        if stored.last_lsn is None:
            # nothing new: no commit within the body, or, further on, frames it had already; then
            # it is asked where it stands, for the LSN
            if stored.accepted_offset <= max(offset, LOG_HEADER_BYTES):
                self.position = before
            return stored
        self._confirm(
            Position(
                last_lsn=stored.last_lsn,
                salts=(stored.salt1, stored.salt2),
                offset=stored.accepted_offset,
            )
        )
        self.status.sent_bytes += stored.accepted_offset - offset
        self.note(
            "wal_sent",
            f"{stored.frames} frames, {stored.commits} commits sent.",
            frames=stored.frames,
            commits=stored.commits,
            last_lsn=stored.last_lsn,
        )
        return stored

    async def send_image(self, body: Body, *, content_bytes: int, log: Log) -> ImageStored:
        """The database as of the end of `log`."""
        self.position = None
        position = {
            "salt1": log.salts[0],
            "salt2": log.salts[1],
            "offset": log.end,
            "checksum1": log.checksums[0],
            "checksum2": log.checksums[1],
        }
        stored = await self._client.libsql.put_image(
            self._target.tenant,
            self._target.database,
            body,
            content_bytes=content_bytes,
            position=position if log.frames else None,
        )
        self._confirm(Position(last_lsn=stored.lsn, salts=log.salts, offset=log.end))
        self.image_reason = None
        self.status.images += 1
        self.note(
            "image_sent",
            f"An image of {stored.page_count} pages was sent, {stored.changed_pages} of them new.",
            last_lsn=stored.lsn,
            page_count=stored.page_count,
            changed_pages=stored.changed_pages,
        )
        return stored

    # --- what its refusals mean

    def judge(self, problem: ProblemError, *, page_size: int, was_image: bool) -> None:
        """Raises Refused for one that asking again does not change."""
        said = told(problem)
        if problem.code == "wal_gap" and (position := _position_told(problem)) is not None:
            self._settle_position(position)
            self._gap("the service refuses to go on where it says it is")
        elif problem.status in _LATER or _is_too_slow(problem) or problem.code == "wal_gap":
            self.go_away(said, problem.retry_after_seconds or 0.0)
        elif not was_image and self._is_halved(problem):
            pass
        elif problem.code in _NEEDS_IMAGE and not was_image:
            self.image_reason = _NEEDS_IMAGE[problem.code]
        elif problem.code in {"database_conflict", "page_size_mismatch"}:
            raise Refused(
                f"{self._target.path} has pages of {page_size} bytes, which is not what "
                f"{self._target.name} was made for: {said}",
                code=problem.code,
            ) from problem
        else:
            raise Refused(said, code=problem.code) from problem

    def _is_halved(self, problem: ProblemError) -> bool:
        """Whether a smaller request is what is asked for."""
        if problem.status != 413 or problem.code == "transaction_too_large":
            return False
        if self._asked_bytes <= REQUEST_BYTES_MIN:
            return False
        self._request_bytes_max = max(self._asked_bytes // 2, REQUEST_BYTES_MIN)
        self._request_bytes = min(self._request_bytes, self._request_bytes_max)
        return True

    def go_away(self, reason: str, at_least_seconds: float = 0.0) -> None:
        """It is not asked for a while; what became of the last request is not known."""
        self.position = None
        seconds = AWAY_SECONDS[min(self._away_count, len(AWAY_SECONDS) - 1)]
        self._away_count += 1
        if self._away_count == 1:
            self._away_since = self._now()
        self._away_until = self._now() + min(max(seconds, at_least_seconds), AWAY_SECONDS_MAX)
        self.status.away = True
        self.status.caught_up = False
        if self._away_count == 1:
            said = reason.rstrip(".")
            self.note("service_away", f"The service is away: {said}.", reason=said)

    def come_back(self) -> None:
        """It took something, or there is nothing to take: an answer alone does not tell."""
        if self._away_count:
            self.note("service_back", "The service is back.", last_lsn=self.status.last_lsn)
        self._away_count = 0
        self.status.away = False

    def _gap(self, reason: str) -> None:
        self._gap_count += 1
        if self._gap_count >= GAPS_MAX:
            self._gap_count = 0
            self.image_reason = reason

    def note(self, kind: Kind, detail: str, **members: int | str | None) -> None:
        self._tell(Event(event=kind, database=self._target.name, detail=detail, members=members))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def told(problem: ProblemError) -> str:
    if problem.code == "unexpected_answer":  # its text may be a page for browsers
        return f"what answers is no bop-checkpoint service: {problem.status} {problem.title}"
    return problem.detail or problem.title


def _position_told(problem: ProblemError) -> WalPosition | None:
    try:
        return wal_position(problem)
    except UnexpectedAnswer:
        return None


def _is_too_slow(problem: ProblemError) -> bool:
    """The service gave up on a body that did not come."""
    errors = problem.extras.get("errors")
    return isinstance(errors, list) and any(
        isinstance(each, dict) and each.get("type") == "timeout" for each in errors
    )
