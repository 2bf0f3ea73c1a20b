"""The short way of a hot page: from memory or not at all, and never older than the newest."""

import pytest

from app.core.base.errors import DatabaseNotFound
from app.core.reads.heads import Heads
from app.core.stores.manifest import ops
from tests.helpers.paged import PagedDatabase, made_page, paged_database

PAGE, CHUNK = 512, 65536


@pytest.fixture
async def db(tmp_path):
    async with paged_database(tmp_path, page_size=PAGE, chunk_bytes=CHUNK) as db:
        await db.publish(rewrites={0: {n: made_page(n, PAGE) for n in range(1, 20)}}, last_lsn=0)
        yield db


async def warm(db: PagedDatabase, *page_nos: int) -> None:
    with await db.store.point(db.db_id) as point:
        for page_no in page_nos:
            await db.store.read_page(point, page_no)


async def test_a_page_is_given_once_it_is_in_memory(db):
    assert db.store.get_page(db.db_id, 3) is None
    await warm(db, 3)
    found = db.store.get_page(db.db_id, 3)
    assert (found.data, found.generation, found.lsn) == (db.content[3], 1, db.lsn)
    assert db.pins.generations(db.db_id) == frozenset()


async def test_a_page_that_the_log_has_newer_is_not_given(db):
    await warm(db, 3, 4)
    await db.append({3: made_page(300, PAGE)})
    assert db.store.get_page(db.db_id, 3) is None
    found = db.store.get_page(db.db_id, 4)
    assert (found.data, found.lsn) == (db.content[4], db.lsn)


async def test_a_page_that_was_cut_off_is_not_given(db):
    await warm(db, 3, 15)
    await db.append({3: made_page(300, PAGE)}, page_count=10)
    assert db.store.get_page(db.db_id, 15) is None  # beyond the end
    await db.append({20: made_page(400, PAGE)}, page_count=20)
    assert db.store.get_page(db.db_id, 15) is None  # zeros now


async def test_a_publication_is_seen_at_once(db):
    await warm(db, 3)
    await db.publish(deltas={0: {3: made_page(900, PAGE)}}, patched=False)
    assert db.store.get_page(db.db_id, 3) is None
    await warm(db, 3)
    found = db.store.get_page(db.db_id, 3)
    assert (found.data, found.generation) == (made_page(900, PAGE), 2)


@pytest.mark.parametrize("page_no", [0, 20, 1 << 31])
async def test_what_is_no_page_of_it_is_left_to_the_long_way(db, page_no):
    assert db.store.get_page(db.db_id, page_no) is None


async def test_a_log_that_was_not_read_yet_is_left_to_the_long_way(db):
    await warm(db, 3)
    index = db.wal.log(db.db_id).frames.index
    index._unread[1] = object()
    assert db.store.get_page(db.db_id, 3) is None
    index._unread.clear()
    assert db.store.get_page(db.db_id, 3) is not None


async def test_the_head_is_read_once_per_version_of_the_manifest(db, monkeypatch):
    heads, reads = Heads(db.manifest), 0
    read = db.manifest.read

    def counted():
        nonlocal reads
        reads += 1
        return read()

    monkeypatch.setattr(db.manifest, "read", counted)
    assert [heads.get(db.db_id).generation for _ in range(3)] == [1, 1, 1]
    assert reads == 1
    await db.publish(deltas={0: {3: made_page(900, PAGE)}})
    assert [heads.get(db.db_id).generation for _ in range(3)] == [2, 2, 2]
    assert reads == 2


async def test_rows_of_an_older_view_are_read_again(db, monkeypatch):
    """A commit is in the newest version a moment before a view shows it."""
    heads = Heads(db.manifest)
    heads.get(db.db_id)
    version = type(db.manifest).version
    monkeypatch.setattr(type(db.manifest), "version", property(lambda self: version.fget(self) + 1))
    first, second = heads.get(db.db_id), heads.get(db.db_id)
    assert first is not second  # not kept under a version whose rows it does not have


async def test_heads_are_bounded_and_know_what_is_missing(db):
    heads = Heads(db.manifest, heads_max=1)
    receipt = await db.manifest.commit(
        ops.ManifestBatch(
            ops=(
                ops.CreateDatabase(
                    tenant="acme", name="other", engine="libsql", page_size=PAGE,
                    chunk_bytes=CHUNK, compression="none", created_at_us=1,
                ),
            ),
            reason="test",
        )
    )  # fmt: skip
    other = heads.get(receipt.results[0])
    assert (other.generation, other.lsn, other.page_count) == (0, 0, 0)
    assert heads.get(db.db_id).generation == 1
    assert len(heads) == 1
    with pytest.raises(DatabaseNotFound):
        heads.get(999)
