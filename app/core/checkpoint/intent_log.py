"""Persists what a checkpoint is about to upload and what is confirmed, as its blobs are made.

Invariants: I7: a row, its key included, is durable when `staged` returns; nothing of it is uploaded
before. A resumed job uploads only what no marker confirms.
Concurrency: any number of chunks at once; changes that come together share a commit.
Cancellation: at any await; what the commit under way holds may or may not be durable.
Crash: the job resumes with the intents and markers of the last commit.
"""

import asyncio

import msgspec

from app.core.base.errors import StalePlan
from app.core.base.events import Events
from app.core.checkpoint.intents import (
    StagedRow,
    blob_bytes,
    intent_of,
    progress_of,
    row_of,
    rows_of,
)
from app.core.checkpoint.job_hold import JobHold
from app.core.checkpoint.parts import job_fields
from app.core.engines.base import CheckpointPlan


class IntentLog:
    def __init__(self, hold: JobHold, plan: CheckpointPlan, events: Events) -> None:
        self._hold = hold
        self._plan = plan
        self._events = events
        self._intents = {row_of(intent).chunk_id: intent for intent in hold.job.intents}
        self._committing = asyncio.Lock()
        self._changes = 0
        self._committed = 0

    def is_uploaded(self, chunk_id: int) -> bool:
        intent = self._intents.get(chunk_id)
        return intent is not None and intent.uploaded

    async def staged(self, row: StagedRow) -> None:
        """Raises StalePlan where an earlier run recorded other bytes: its key may be taken."""
        known = self._intents.get(row.chunk_id)
        if known is not None:
            if row_of(known).blob != row.blob:
                raise StalePlan("Staging gave other bytes than before.", chunk_id=row.chunk_id)
            return
        self._intents[row.chunk_id] = intent_of(row)
        await self._commit()

    async def uploaded(self, chunk_id: int) -> None:
        """The store has confirmed the chunk's blob."""
        intent = self._intents[chunk_id]
        self._intents[chunk_id] = msgspec.structs.replace(intent, uploaded=True)
        await self._commit()

    async def _commit(self) -> None:
        self._hold.touch()
        self._changes += 1
        mine = self._changes
        async with self._committing:
            if self._committed >= mine:
                return  # it went along with another's
            upto = self._changes
            await self._write()
            self._committed = upto

    async def _write(self) -> None:
        hold, actions = self._hold, self._plan.actions
        # In the plan's order, whatever order they were made in.
        known = (self._intents.get(action.chunk_id) for action in actions)
        intents = tuple(intent for intent in known if intent is not None)
        all_staged = len(intents) == len(actions)
        stage = "uploading" if all_staged else "staging"
        staged_now = all_staged and hold.job.stage == "staging"
        await hold.update(
            reason=f"checkpoint.{stage}",
            changes={
                "stage": stage,
                "intents": intents,
                "progress": progress_of(intents, plan=self._plan),
            },
        )
        if staged_now:
            self._events.info(
                "checkpoint.staged", chunks=len(intents), bytes=blob_bytes(rows_of(intents)),
                **job_fields(hold.job),
            )  # fmt: skip
