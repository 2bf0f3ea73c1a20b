"""After a publication, only onwards: its document, then `checkpointed_lsn`, then the WAL.

Invariants: I3: the generation's document is on the remote store before `checkpointed_lsn` moves and
before any WAL goes (I4). I15: what an earlier attempt stored is recognised, not guessed. I17:
another document in its place means another owner.
Concurrency: nothing else of the database publishes until it is done (`jobs/slots.py`), so that the
document is the same however often it is made.
Cancellation, crash: at any point; the next attempt does the rest.
"""

from app.core.base import failpoints
from app.core.base.errors import InvariantViolation, OwnershipLost
from app.core.checkpoint.generation_document import (
    build_document,
    decode_document,
    encode_document,
)
from app.core.checkpoint.job_hold import JobHold
from app.core.checkpoint.parts import CheckpointParts
from app.core.formats.crc64 import crc64
from app.core.stores.manifest.ops import AdvanceCheckpointed
from app.core.stores.manifest.records import GenerationRecord
from app.core.stores.remote.protocol import BytesBody


async def complete_publication(parts: CheckpointParts, hold: JobHold) -> None:
    """Of `hold.job.published_generation`."""
    db_id, number = hold.job.db_id, hold.job.published_generation
    assert number is not None
    with parts.manifest.read() as view:
        database = view.database(db_id)
        generation = view.generation(db_id, number)
        chunks = view.chunk_states(db_id, number)
        deltas = view.delta_view(db_id, number)
    if database is None or generation is None:
        raise InvariantViolation("a published generation is gone", db_id=db_id)
    if not generation.document_stored:
        document = build_document(database, generation, chunks, deltas)
        failpoints.fp("publish.before_document")
        await _store_document(parts, generation, encode_document(document))
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


async def _store_document(
    parts: CheckpointParts, generation: GenerationRecord, data: bytes
) -> None:
    remote, key = parts.remote(), generation.document_key
    body = BytesBody(data=data, crc64=crc64(data))
    if await remote.put_if_absent(key, body) is not None:
        return
    stored = decode_document(await remote.get_blob(key), key=key)
    if not stored.says_the_same_as(decode_document(data, key=key)):
        raise OwnershipLost(f"Another process published this generation: {key}")
