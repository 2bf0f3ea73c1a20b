"""One flush, on a writer thread: plan, write, tell; then seal what is full, and tell again.

Concurrency: one at a time per log; the loop touches nothing that it uses until told.
"""

from collections.abc import Callable
from dataclasses import dataclass

from app.core.base.clock import Clock, wall_us
from app.core.base.errors import BopError, StorageFailure
from app.core.stores.wal.draft import Draft
from app.core.stores.wal.failure import FailStop
from app.core.stores.wal.group_commit import Group
from app.core.stores.wal.log_frames import WrittenFrames
from app.core.stores.wal.planning import GroupPlan, OpenSegment, plan_group
from app.core.stores.wal.requests import AppendRequest
from app.core.stores.wal.segments import Segment, SegmentInfo
from app.core.stores.wal.writer import LogWriter, Written

NO_PLAN = GroupPlan(runs=(), outcomes=(), next_lsn=0)


@dataclass(slots=True, kw_only=True)
class Flushed:
    """What became durable. With `error` nothing of the group did, or nobody knows."""

    group: Group
    plan: GroupPlan
    written: Written = ()
    frames: tuple[WrittenFrames, ...] = ()
    """Of libsql databases, for each of `written`."""
    unsealed: list[Segment]
    seconds: float = 0.0
    error: Exception | None = None
    sealing: bool = False
    """`Sealed` follows; until then the thread is at work."""


@dataclass(slots=True, kw_only=True)
class Sealed:
    group: Group
    sealed: list[tuple[Segment, SegmentInfo]]
    error: Exception | None = None


class Flusher:
    def __init__(
        self,
        writer: LogWriter,
        *,
        chunk_bytes: int,
        has_frames: bool,
        fail_stop: FailStop,
        clock: Clock,
    ) -> None:
        self._writer = writer
        self._has_frames = has_frames
        self._chunk_bytes = chunk_bytes
        self._fail_stop = fail_stop
        self._clock = clock

    def draft_blocking(self, request: AppendRequest, next_lsn: int) -> Draft:
        """Of a request that begins a segment with `next_lsn`."""
        plan = plan_group([request], next_lsn=next_lsn, tail=None, chunk_bytes=self._chunk_bytes)
        return self._writer.draft(plan, now_us=wall_us(self._clock))

    def flush_blocking(
        self,
        group: Group,
        next_lsn: int,
        unsealed: list[Segment],
        tell: Callable[[Flushed | Sealed], None],
    ) -> None:
        """Raises nothing: `tell` is called once, or twice if segments are to be sealed."""
        flushed = Flushed(group=group, plan=NO_PLAN, unsealed=unsealed)
        started = self._clock.monotonic()
        try:
            self._write_blocking(flushed, next_lsn)
        except Exception as error:  # noqa: BLE001 - a bug here must not look like an answer
            flushed.error = self._judge(error)
            tell(flushed)
            return
        flushed.seconds = self._clock.monotonic() - started
        to_seal = flushed.unsealed if group.seal is not None else flushed.unsealed[:-1]
        to_seal = [segment for segment in to_seal if segment.written.entries]
        flushed.sealing = bool(to_seal)
        tell(flushed)
        if to_seal:
            tell(self._seal_blocking(group, to_seal))

    def _write_blocking(self, flushed: Flushed, next_lsn: int) -> None:
        self._fail_stop.check()
        tail = flushed.unsealed[-1] if flushed.unsealed else None
        if tail is not None and tail.file_sealed is not None:
            tail = None  # only its row is missing
        open_segment = None
        if tail is not None:
            open_segment = OpenSegment(
                segment_id=tail.segment_id, ceiling_lsn=tail.ceiling_lsn, marks=tail.written
            )
        draft = _draft_of(flushed.group, next_lsn=next_lsn, has_tail=tail is not None)
        flushed.plan = (
            draft.plan
            if draft is not None
            else plan_group(
                [waiting.request for waiting in flushed.group.appends],
                next_lsn=next_lsn,
                tail=open_segment,
                chunk_bytes=self._chunk_bytes,
            )
        )
        if not flushed.plan.runs:
            return
        flushed.written = self._writer.write_group_blocking(
            flushed.plan, tail=tail, durable_lsn=next_lsn - 1, now_us=wall_us(self._clock),
            draft=draft,
        )  # fmt: skip
        if self._has_frames:
            flushed.frames = tuple(map(WrittenFrames.of, flushed.plan.runs))
        created = [segment for segment, _ in flushed.written if segment is not tail]
        if created:
            flushed.unsealed = [*flushed.unsealed, *created]

    def _seal_blocking(self, group: Group, segments: list[Segment]) -> Sealed:
        """In order, and no further than the first that cannot be: the unsealed ones are always
        the last ones. A later flush tries again.
        """
        result = Sealed(group=group, sealed=[])
        try:
            for segment in segments:
                self._fail_stop.check()
                result.sealed.append((segment, self._writer.seal_blocking(segment)))
        except Exception as error:  # noqa: BLE001 - as above
            result.error = self._judge(error)
        return result

    def _judge(self, error: Exception) -> Exception:
        """What is neither a refusal nor a full disk leaves the outcome unknown: fail-stop (I16)."""
        if isinstance(error, BopError):
            return error
        failure = error
        if not isinstance(failure, StorageFailure):
            failure = StorageFailure(f"The WAL's writer failed: {error!r}")
            failure.__cause__ = error
        self._fail_stop.trip(failure)
        return failure


def _draft_of(group: Group, *, next_lsn: int, has_tail: bool) -> Draft | None:
    """The draft that is all of the group, if the log is still where it was made for."""
    if len(group.appends) != 1:
        return None
    waiting = group.appends[0]
    draft = waiting.draft
    if draft is None or not draft.fits(next_lsn=next_lsn, has_tail=has_tail):
        return None
    return draft
