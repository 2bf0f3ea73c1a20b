from app.core.stores.manifest.records import DatabaseRecord, GenerationRecord
from app.core.workers.verification import next_due


def candidate(db_id, *, verified=None, committed=1):
    database = DatabaseRecord(
        db_id=db_id, tenant="acme", name=f"d{db_id}", engine="libsql", page_size=4096,
        chunk_bytes=65536, compression="zstd", created_at_us=0, generation=1,
    )  # fmt: skip
    generation = GenerationRecord(
        db_id=db_id, generation=1, checkpoint_id="c", first_lsn=1, last_lsn=1, page_count=1,
        committed_at_us=committed, base_chunks=1, delta_chunks=0, bytes_uploaded=0,
        document_key="g", verified_at_us=verified,
    )  # fmt: skip
    return database, generation


def due(candidates, asked=None, *, before=1000):
    found = next_due(candidates, asked or {}, before_us=before)
    return None if found is None else found[0].db_id


def test_never_verified_comes_before_verified_long_ago():
    pairs = [candidate(1, verified=5), candidate(2, committed=90), candidate(3, committed=80)]
    assert due(pairs) == 3
    assert due(pairs[:2]) == 2
    assert due(pairs[:1]) == 1


def test_what_was_verified_lately_is_not_due():
    assert due([candidate(1, verified=1000), candidate(2, verified=999)]) == 2
    assert due([candidate(1, verified=1000)]) is None
    assert due([]) is None


def test_one_that_stays_damaged_keeps_nobody_waiting():
    pairs = [candidate(1), candidate(2, verified=500)]
    assert due(pairs, {1: 600}) == 2
    assert due(pairs, {1: 1001}) == 2
    assert due(pairs[:1], {1: 1001}) is None
