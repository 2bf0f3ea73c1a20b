"""append_only: every sealed segment that no generation covers yet becomes the next chunk."""

from app.core.base.errors import InvariantViolation
from app.core.engines.base import CheckpointPlan, PlannerContext, SealAsBase


def plan_checkpoint(context: PlannerContext) -> CheckpointPlan | None:
    """Pure; None if no segment waits. Raises InvariantViolation where LSNs run backwards."""
    database, segments = context.database, context.segments
    if not segments:
        return None
    last = max((chunk.last for chunk in context.chunks), default=0)
    actions = []
    for position, segment in enumerate(segments):
        if segment.first_lsn <= last:
            raise InvariantViolation(
                "a WAL segment begins below what is published",
                db_id=database.db_id, segment_id=segment.segment_id,
                first_lsn=segment.first_lsn, published_lsn=last,
            )  # fmt: skip
        last = segment.last_lsn
        actions.append(
            SealAsBase(
                chunk_id=database.next_chunk_id + position,
                segment_id=segment.segment_id,
                first_lsn=segment.first_lsn,
                last_lsn=segment.last_lsn,
                segment_bytes=segment.segment_bytes,
                line_safe=segment.line_safe,
                visible_last=segment.visible_last,
            )
        )
    return CheckpointPlan(
        engine="append_only",
        db_id=database.db_id,
        checkpoint_id=context.checkpoint_id,
        epoch=context.epoch,
        expected_generation=database.generation,
        first_lsn=segments[0].first_lsn,
        # Of what was given out below the floor nothing else is left: the generation covers it too.
        last_lsn=max(segments[-1].last_lsn, database.floor_lsn - 1),
        page_count=0,
        next_chunk_id=database.next_chunk_id + len(actions),
        codec=database.compression,
        actions=tuple(actions),
    )
