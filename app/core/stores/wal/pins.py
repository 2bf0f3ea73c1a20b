"""What a reader holds on to while it reads (I4). Loop-confined."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from app.core.formats.segment import IndexArray
from app.core.stores.wal.segments import Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedSegment:
    """A segment as it was durable when it was pinned: bytes up to `entries_end` never change."""

    segment_id: int
    path: Path
    first_lsn: int
    durable_last_lsn: int
    entries_end: int
    index: IndexArray = field(compare=False, repr=False)
    sealed: bool
    line_safe: bool


class WalPin:
    """Pinned segments are not removed until `release`, which may be said more than once."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._held: Sequence[Segment] = segments
        for segment in segments:
            segment.pins += 1
        self.segments = tuple(
            PinnedSegment(
                segment_id=segment.segment_id,
                path=segment.path,
                first_lsn=segment.first_lsn,
                durable_last_lsn=segment.durable_last_lsn,
                entries_end=segment.durable.entries_end,
                index=segment.durable_index(),
                sealed=segment.info is not None,
                line_safe=segment.durable.line_safe,
            )
            for segment in segments
        )

    def release(self) -> None:
        held, self._held = self._held, ()
        for segment in held:
            segment.pins -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
