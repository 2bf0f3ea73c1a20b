"""After a publication, only onwards: its document, then `checkpointed_lsn`, then the WAL.

Invariants: I3: the generation's document is on the remote store before `checkpointed_lsn` moves and
before any WAL goes (I4). I15: what an earlier attempt stored is recognised, not guessed. I17:
another document in its place means another owner.
Concurrency: nothing else of the database publishes until it is done (`jobs/slots.py`), so that the
document is the same however often it is made.
Cancellation, crash: at any point; the next attempt does the rest.
"""

from app.core.base import failpoints
from app.core.base.errors import InvariantViolation
from app.core.checkpoint.document_store import make_document, store_document
from app.core.checkpoint.job_hold import JobHold
from app.core.checkpoint.parts import CheckpointParts
from app.core.stores.manifest.ops import AdvanceCheckpointed


async def complete_publication(parts: CheckpointParts, hold: JobHold) -> None:
    """Of `hold.job.published_generation`."""
    db_id, number = hold.job.db_id, hold.job.published_generation
    assert number is not None
    with parts.manifest.read() as view:
        database, generation = view.database(db_id), view.generation(db_id, number)
    if database is None or database.state == "tombstoned":
        return  # it was deleted meanwhile: nothing of it is to be kept
    if generation is None:
        raise InvariantViolation("a published generation is gone", db_id=db_id)
    if not generation.document_stored:
        document = await parts.manifest.read_in_thread(
            lambda view: make_document(
                database, generation, view.chunk_states(db_id, number),
                view.delta_view(db_id, number),
            )
        )  # fmt: skip
        failpoints.fp("publish.before_document")
        await store_document(parts.remote(), document)
        failpoints.fp("publish.after_document")
        await hold.update(
            reason="checkpoint.durable",
            changes={},
            ops=(AdvanceCheckpointed(db_id=db_id, generation=number, lsn=generation.last_lsn),),
            allow_cancelled=True,
        )
        parts.on_durable(db_id)
    failpoints.fp("publish.before_wal_release")
    await parts.release.release(db_id)
    failpoints.fp("publish.after_wal_release")
