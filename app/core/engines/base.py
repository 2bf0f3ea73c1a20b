"""What a planner decides, as values.

A planner is a pure function from a PlannerContext to a CheckpointPlan: the same input gives the
same plan, to the byte, so that a retry makes the same blobs under the same keys (I7). Nothing
here does I/O.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import msgspec

from app.core.base.errors import InvariantViolation
from app.core.formats.chunk import log_container_bytes_max
from app.core.stores.manifest.records import (
    ChunkDeltaRecord,
    ChunkRecord,
    Codec,
    DatabaseRecord,
    Engine,
)

PLAN_VERSION = 1


class SealAsBase(msgspec.Struct, frozen=True, kw_only=True, tag="seal_as_base"):
    """append_only: a sealed WAL segment becomes a chunk, one to one."""

    chunk_id: int
    segment_id: int
    first_lsn: int
    last_lsn: int
    segment_bytes: int
    line_safe: bool
    visible_last: int | None = None
    """Where a tail truncation cut it; None: nowhere."""

    @property
    def staged_bytes_max(self) -> int:
        return self.segment_bytes


class CreateDelta(msgspec.Struct, frozen=True, kw_only=True, tag="create_delta"):
    """libsql: the pages of `pages` become one more delta over the chunk, or, where `merges` is not
    empty, one in the place of all of its deltas.
    """

    chunk_id: int
    delta_id: int
    pages: bytes
    """Roaring bitmap, portable format."""
    page_count: int
    base_generation: int
    """The valid base row's, over which it lies."""
    base_key: str
    """The base blob that it is encoded against; empty: complete pages."""
    merges: tuple[int, ...]
    """Generations of the deltas that it supersedes."""
    chain_length: int
    """Deltas over the base once it is published."""
    staged_bytes_max: int


class RewriteBase(msgspec.Struct, frozen=True, kw_only=True, tag="rewrite_base"):
    """libsql: all pages of the chunk become its new base."""

    chunk_id: int
    first_page: int
    last_page: int
    supersedes_base: int | None
    """Generation of the base or drop that it takes the place of."""
    supersedes_deltas: tuple[int, ...]
    staged_bytes_max: int


class Drop(msgspec.Struct, frozen=True, kw_only=True, tag="drop"):
    """libsql: the database no longer reaches to the chunk."""

    chunk_id: int
    first_page: int
    supersedes_base: int | None
    supersedes_deltas: tuple[int, ...]

    @property
    def staged_bytes_max(self) -> int:
        return 0


class MergeSource(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk row that a merged chunk takes the place of."""

    chunk_id: int
    generation: int
    bytes: int
    """Of its blob."""


class MergeChunks(msgspec.Struct, frozen=True, kw_only=True, tag="merge_chunks"):
    """append_only: adjacent small chunks become one. Records do not change."""

    chunk_id: int
    """The first source's."""
    sources: tuple[MergeSource, ...]
    first_lsn: int
    last_lsn: int
    segment_bytes: int
    """What the merged segment takes at most."""
    line_safe: bool

    @property
    def staged_bytes_max(self) -> int:
        """The merged segment, and the sources' blobs where they are not at hand."""
        return self.segment_bytes + sum(source.bytes for source in self.sources)


PageAction = CreateDelta | RewriteBase | Drop
ChunkAction = SealAsBase | MergeChunks | CreateDelta | RewriteBase | Drop


class CheckpointPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a checkpoint will do; persisted with its job before anything is done."""

    version: int = PLAN_VERSION
    engine: Engine
    db_id: int
    checkpoint_id: str
    epoch: int
    expected_generation: int
    """Of the database when the plan was made; the publication is refused if it moved (I6)."""
    first_lsn: int
    last_lsn: int
    page_count: int
    next_chunk_id: int
    codec: Codec
    actions: tuple[ChunkAction, ...]
    """In chunk order."""
    covered_segments: tuple[int, ...] = ()
    """libsql: the sealed segments whose LSNs are all in the new generation."""
    low_page_count: int = 0
    """libsql: the fewest pages that the database had since the generation before. What lay above
    and was not written again is zeros.
    """
    bytes_dirtied: int = 0
    """libsql: pages that really changed, for write amplification."""
    wal_position: bytes = b""
    """libsql: where the application's log was left, which the WAL's removal must not forget."""

    @property
    def segment_ids(self) -> tuple[int, ...]:
        """The sealed segments that the new generation covers."""
        sealed = (one.segment_id for one in self.actions if isinstance(one, SealAsBase))
        return (*sealed, *self.covered_segments)

    @property
    def frees_wal(self) -> bool:
        return not any(isinstance(action, MergeChunks) for action in self.actions)

    @property
    def leased_chunk_ids(self) -> tuple[int, ...]:
        """The chunks that the plan changes, in order."""
        merged = [
            source.chunk_id
            for action in self.actions
            if isinstance(action, MergeChunks)
            for source in action.sources
        ]
        return tuple(merged) or tuple(action.chunk_id for action in self.actions)

    @property
    def target_generation(self) -> int:
        return self.expected_generation + 1

    def room_bytes(self, *, links: bool) -> int:
        """What staging may take of the disk at most. With `links` a segment that stays as it is
        takes nothing more: its inode is paid for as WAL.
        """
        is_linked = all(isinstance(action, SealAsBase) for action in self.actions)
        if links and is_linked and self.codec == "none":
            return 0
        return self.staged_bytes_max

    @property
    def staged_bytes_max(self) -> int:
        """What staging may hold in scratch at most."""
        packed = self.codec != "none"
        return sum(
            log_container_bytes_max(action.staged_bytes_max)
            if packed and isinstance(action, SealAsBase)
            else action.staged_bytes_max
            + (
                log_container_bytes_max(action.segment_bytes)
                if packed and isinstance(action, MergeChunks)
                else 0
            )
            for action in self.actions
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentView:
    """A sealed WAL segment, as far as planning needs to know it. `engine` is from its header."""

    engine: Engine
    segment_id: int
    first_lsn: int
    last_lsn: int
    segment_bytes: int
    line_safe: bool
    visible_last: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaLimits:
    """When a delta is worth it."""

    enabled: bool = True
    """The tenant's `enable_chunk_deltas`; off: every dirty chunk is rewritten."""
    delta_bytes_max: int = 10_000_000
    delta_dirty_ratio_max: float = 0.5
    delta_count_max: int = 3
    coalesce: Literal["merge", "rewrite"] = "merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkState:
    """libsql: a chunk that has changed, as far as planning needs to know it."""

    chunk_id: int
    base: ChunkRecord | None
    """The valid base or drop row."""
    deltas: tuple[ChunkDeltaRecord, ...]
    """The valid ones, oldest first."""
    dirty: bytes
    """Roaring bitmap of the pages whose content differs from the generation before."""
    delta_bytes: int
    """What a delta of the dirty pages is expected to take, from a sample."""
    base_at_hand: bool
    """The base blob lies on the local disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageChanges:
    """libsql: what the sealed WAL changes. `page_count` is the database's after its last commit."""

    last_lsn: int
    page_count: int
    low_page_count: int
    chunks: tuple[ChunkState, ...]
    """The dirty ones, and those beyond the database's end; in chunk order."""
    wal_position: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerContext:
    """The manifest view and the WAL at one moment. `segments` are sealed and in LSN order; those
    that a generation already covers are left out.
    """

    database: DatabaseRecord
    chunks: tuple[ChunkRecord, ...]
    segments: tuple[SegmentView, ...]
    checkpoint_id: str
    epoch: int
    pages: PageChanges | None = None
    """libsql only."""
    limits: DeltaLimits = field(default_factory=DeltaLimits)


class Planner(Protocol):
    def __call__(self, context: PlannerContext) -> CheckpointPlan | None:
        """None: there is nothing to publish."""
        ...


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(CheckpointPlan)


def encode_plan(plan: CheckpointPlan) -> bytes:
    return _encoder.encode(plan)


def decode_plan(data: bytes) -> CheckpointPlan:
    """Raises InvariantViolation for a plan that this version did not write."""
    try:
        plan = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError) as error:  # bytes that are no UTF-8
        raise InvariantViolation("a persisted plan cannot be read", reason=str(error)) from error
    if plan.version != PLAN_VERSION:
        raise InvariantViolation("a persisted plan has an unknown version", version=plan.version)
    return plan
