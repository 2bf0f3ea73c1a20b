"""The generation document: everything a restore needs, and nothing that a retry would change."""

import msgspec
import pytest
import zstandard

from app.core.base.errors import CorruptBlob, FormatFromFuture
from app.core.checkpoint.generation_document import (
    build_document,
    decode_document,
    encode_document,
    restored_database,
    restored_deltas,
    restored_generation,
    restored_rows,
)
from app.core.services.recovery import catalogue_rows, delta_rows
from app.core.stores.manifest.records import (
    BlobRef,
    ChunkDeltaRecord,
    ChunkRecord,
    DatabaseRecord,
    ForkParent,
    GenerationRecord,
    Retention,
)

DATABASE = DatabaseRecord(
    db_id=9, tenant="acme", name="log", engine="append_only", page_size=0, chunk_bytes=1 << 26,
    compression="zstd", created_at_us=5, generation=3, first_lsn=11, floor_lsn=900,
    checkpointed_lsn=40, next_chunk_id=6, retention=Retention(keep_generations=4),
    forked_from=ForkParent(tenant="acme", database="other", db_id=2, generation=1, inherits=False),
)  # fmt: skip


def row(chunk_id: int, generation: int, first: int, last: int) -> ChunkRecord:
    return ChunkRecord(
        db_id=9, chunk_id=chunk_id, generation=generation,
        blob=BlobRef(
            key=f"checkpoints/acme/log/x/chunk-{chunk_id}-{generation}-00.blob",
            sha256=bytes([chunk_id]) * 32, crc64=(1 << 64) - 1 - chunk_id, bytes=100 + chunk_id,
        ),
        first=first, last=last, visible_last=last - 1, codec="zstd", directory_offset=64,
        directory_bytes=36, logical_bytes=1000, count=last - first + 1, line_safe=True,
        origin_db_id=9,
    )  # fmt: skip


def generation(number: int) -> GenerationRecord:
    return GenerationRecord(
        db_id=9, generation=number, checkpoint_id=f"{number:010d}-000001-01J", first_lsn=31,
        last_lsn=40, page_count=0, committed_at_us=1000 + number, base_chunks=2, delta_chunks=0,
        bytes_uploaded=77, document_key=f"generations/acme/log/9/{number:010d}.json.zst",
        document_stored=True,
    )  # fmt: skip


def test_everything_published_comes_back():
    rows = [row(0, 1, 11, 30), row(5, 3, 31, 40)]
    data = encode_document(build_document(DATABASE, generation(3), rows))
    document = decode_document(data, key="k")
    assert restored_rows(document) == rows
    restored = restored_generation(document, document_key=generation(3).document_key)
    assert restored == generation(3)
    assert restored_database(document, floor_lsn=900) == DATABASE


def test_the_same_publication_gives_the_same_bytes():
    rows = [row(0, 1, 11, 30)]
    assert encode_document(build_document(DATABASE, generation(3), rows)) == encode_document(
        build_document(DATABASE, generation(3), rows)
    )


def test_a_retry_after_a_changed_setting_is_still_the_same_publication():
    rows = [row(0, 1, 11, 30)]
    first = build_document(DATABASE, generation(3), rows)
    changed = msgspec.structs.replace(DATABASE, retention=Retention(keep_generations=1))
    assert first.says_the_same_as(build_document(changed, generation(3), rows))
    other = msgspec.structs.replace(generation(3), checkpoint_id="0000000003-000002-01K")
    assert not first.says_the_same_as(build_document(DATABASE, other, rows))
    assert not first.says_the_same_as(build_document(DATABASE, generation(3), []))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "not json", "not ours"])
def test_damage_is_told(damage):
    data = encode_document(build_document(DATABASE, generation(3), [row(0, 1, 11, 30)]))
    compress = zstandard.ZstdCompressor().compress
    broken = {
        "cut": data[: len(data) // 2],
        "flip": data[:4] + bytes([data[4] ^ 255]) + data[5:],
        "empty": b"",
        "not json": compress(b"[1, 2"),
        "not ours": compress(b'{"format": "x"}'),
    }[damage]
    with pytest.raises(CorruptBlob):
        decode_document(broken, key="k")


def test_a_document_of_a_newer_version_is_refused():
    data = zstandard.ZstdCompressor().compress(b'{"format": "bop-generation", "version": 2}')
    with pytest.raises(FormatFromFuture):
        decode_document(data, key="k")


def test_catalogue_rows_end_where_a_later_document_no_longer_names_them():
    first, second, third = row(0, 1, 1, 10), row(1, 2, 11, 20), row(0, 3, 1, 20)
    documents = [
        build_document(DATABASE, generation(1), [first]),
        build_document(DATABASE, generation(2), [first, second]),
        build_document(DATABASE, generation(3), [third]),
    ]
    assert catalogue_rows(documents) == [
        msgspec.structs.replace(first, superseded_at=3),
        third,
        msgspec.structs.replace(second, superseded_at=3),
    ]


def test_a_row_ends_where_the_next_of_its_chunk_begins_though_no_document_of_then_is_left():
    """Generations 2 to 4 have expired: what superseded the first row is known all the same."""
    first, second = row(0, 1, 1, 10), row(0, 3, 1, 20)
    documents = [
        build_document(DATABASE, generation(1), [first]),
        build_document(DATABASE, generation(5), [second]),
    ]
    assert catalogue_rows(documents) == [
        msgspec.structs.replace(first, superseded_at=3),
        second,
    ]


def delta(chunk_id: int, number: int, *, base_key: str = "base") -> ChunkDeltaRecord:
    return ChunkDeltaRecord(
        db_id=9, chunk_id=chunk_id, generation=number, delta_id=number,
        blob=BlobRef(key=f"delta-{chunk_id}-{number}", sha256=bytes(32), crc64=7, bytes=50),
        base_key=base_key, pages=bytes(range(256)), codec="zstd", directory_offset=64,
        directory_bytes=300, logical_bytes=4096, count=1, origin_db_id=9,
    )  # fmt: skip


def drop(chunk_id: int, number: int) -> ChunkRecord:
    return ChunkRecord(
        db_id=9, chunk_id=chunk_id, generation=number, blob=None, first=101, last=200,
        visible_last=100, origin_db_id=9,
    )  # fmt: skip


def test_deltas_and_drops_come_back():
    rows, deltas = [row(0, 1, 1, 100), drop(1, 3)], [delta(0, 2), delta(0, 3, base_key="")]
    published = msgspec.structs.replace(generation(3), base_chunks=0, delta_chunks=2)
    database = msgspec.structs.replace(DATABASE, engine="libsql", wal_position=b"\x00where")
    document = decode_document(
        encode_document(build_document(database, published, rows, deltas)), key="k"
    )
    assert restored_rows(document) == rows
    assert restored_deltas(document) == deltas
    assert restored_database(document, floor_lsn=41).wal_position == b"\x00where"
    assert restored_generation(document, document_key=published.document_key) == published
    fewer = build_document(database, published, rows, deltas[:1])
    assert not document.says_the_same_as(fewer)
    # Collection may leave a drop behind between two attempts to store the same document.
    assert document.says_the_same_as(build_document(database, published, rows[:1], deltas))


def test_deltas_are_valid_until_a_generation_leaves_them_out():
    rows = [row(0, 1, 1, 100)]
    documents = [
        build_document(DATABASE, generation(1), rows, [delta(0, 1)]),
        build_document(DATABASE, generation(2), rows, [delta(0, 1), delta(0, 2)]),
        build_document(DATABASE, generation(3), rows, [delta(0, 3)]),
    ]
    assert [(found.generation, found.superseded_at) for found in delta_rows(documents)] == [
        (1, 3),
        (2, 3),
        (3, None),
    ]


def test_a_document_of_before_deltas_still_reads():
    plain = msgspec.json.decode(
        zstandard.ZstdDecompressor().decompress(
            encode_document(build_document(DATABASE, generation(3), [row(0, 1, 11, 30)]))
        )
    )
    for name in ("deltas", "drops"):
        del plain[name]
    for name in ("base_chunks", "delta_chunks", "wal_position"):
        del plain["generation"][name]
    data = zstandard.ZstdCompressor().compress(msgspec.json.encode(plain))
    document = decode_document(data, key="k")
    assert restored_deltas(document) == []
    assert restored_generation(document, document_key="d").base_chunks == 1
