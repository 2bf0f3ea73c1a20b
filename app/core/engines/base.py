"""What a planner decides, as values.

A planner is a pure function from a PlannerContext to a CheckpointPlan: the same input gives the
same plan, to the byte, so that a retry makes the same blobs under the same keys (I7). Nothing
here does I/O.
"""

from dataclasses import dataclass
from typing import Protocol

import msgspec

from app.core.base.errors import InvariantViolation
from app.core.formats.chunk import log_container_bytes_max
from app.core.stores.manifest.records import ChunkRecord, Codec, DatabaseRecord, Engine

PLAN_VERSION = 1


class SealAsBase(msgspec.Struct, frozen=True, kw_only=True, tag="seal_as_base"):
    """append_only: a sealed WAL segment becomes a chunk, one to one."""

    chunk_id: int
    segment_id: int
    first_lsn: int
    last_lsn: int
    segment_bytes: int
    line_safe: bool


ChunkAction = SealAsBase


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

    @property
    def target_generation(self) -> int:
        return self.expected_generation + 1

    @property
    def staged_bytes_max(self) -> int:
        """What staging may hold in scratch at most."""
        return sum(
            action.segment_bytes
            if self.codec == "none"
            else log_container_bytes_max(action.segment_bytes)
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
    except msgspec.DecodeError as error:
        raise InvariantViolation("a persisted plan cannot be read", reason=str(error)) from error
    if plan.version != PLAN_VERSION:
        raise InvariantViolation("a persisted plan has an unknown version", version=plan.version)
    return plan
