"""The generation document: what the bucket says of one generation, whole.

zstd-compressed JSON under `generations/{tenant}/{database}/{db_id}/{generation:010d}.json.zst`. It
holds the database's descriptor and every valid chunk row, so that the bucket alone restores what
was published (I3). Hashes are lower-case hex, timestamps microseconds since the Unix epoch.
"""

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import zstandard

from app.core.base.errors import CorruptBlob
from app.core.formats.json_document import decode_json_document
from app.core.stores.manifest.records import (
    BlobRef,
    ChunkDeltaRecord,
    ChunkRecord,
    Codec,
    DatabaseRecord,
    Engine,
    ForkParent,
    GenerationRecord,
    Retention,
)

FORMAT = "bop-generation"
VERSION = 1
DOCUMENT_BYTES_MAX = 1 << 30


class DocumentBlob(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    sha256: str
    crc64: str
    bytes: int


class DocumentChunk(msgspec.Struct, frozen=True, kw_only=True):
    chunk_id: int
    generation: int
    blob: DocumentBlob
    first: int
    last: int
    visible_last: int
    codec: Codec
    directory_offset: int
    directory_bytes: int
    logical_bytes: int
    count: int
    line_safe: bool
    origin_db_id: int


class DocumentDelta(msgspec.Struct, frozen=True, kw_only=True):
    chunk_id: int
    generation: int
    delta_id: int
    blob: DocumentBlob
    base_key: str
    pages: str
    """Roaring bitmap, portable format, in base64."""
    codec: Codec
    directory_offset: int
    directory_bytes: int
    logical_bytes: int
    count: int
    origin_db_id: int


class DocumentDrop(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk that the database no longer reached to."""

    chunk_id: int
    generation: int
    first: int
    last: int
    origin_db_id: int


class DocumentDatabase(msgspec.Struct, frozen=True, kw_only=True):
    db_id: int
    tenant: str
    name: str
    engine: Engine
    page_size: int
    chunk_bytes: int
    compression: Codec
    created_at_us: int
    retention: dict[str, int | None]
    forked_from: dict[str, Any] | None = None


class DocumentGeneration(msgspec.Struct, frozen=True, kw_only=True):
    generation: int
    checkpoint_id: str
    first_lsn: int
    last_lsn: int
    readable_from_lsn: int
    page_count: int
    next_chunk_id: int
    committed_at_us: int
    bytes_uploaded: int
    base_chunks: int | None = None
    delta_chunks: int = 0
    wal_position: str = ""
    """Hex."""


class GenerationDocument(msgspec.Struct, frozen=True, kw_only=True):
    format: str = FORMAT
    version: int = VERSION
    database: DocumentDatabase
    generation: DocumentGeneration
    chunks: tuple[DocumentChunk, ...]
    deltas: tuple[DocumentDelta, ...] = ()
    """By chunk, oldest first."""
    drops: tuple[DocumentDrop, ...] = ()

    def says_the_same_as(self, other: "GenerationDocument") -> bool:
        """True if both are the one publication. The descriptor's settings may have changed since
        the first attempt to store it; the generation and its chunks cannot.
        """
        return self.generation == other.generation and self.has_the_chunks_of(other)

    def has_the_chunks_of(self, other: "GenerationDocument") -> bool:
        """Drops do not count: collection may put one where the last row of a fork's chunk was,
        which reads as before.
        """
        return self.chunks == other.chunks and self.deltas == other.deltas


def build_document(
    database: DatabaseRecord,
    generation: GenerationRecord,
    chunks: Sequence[ChunkRecord],
    deltas: Sequence[ChunkDeltaRecord] = (),
) -> GenerationDocument:
    """Pure. `chunks` and `deltas` are the rows valid at `generation`, in chunk order."""
    retention = database.retention
    forked = database.forked_from
    return GenerationDocument(
        database=DocumentDatabase(
            db_id=database.db_id,
            tenant=database.tenant,
            name=database.name,
            engine=database.engine,
            page_size=database.page_size,
            chunk_bytes=database.chunk_bytes,
            compression=database.compression,
            created_at_us=database.created_at_us,
            retention={
                "keep_generations": retention.keep_generations,
                "keep_seconds": retention.keep_seconds,
                "minimum_generations": retention.minimum_generations,
            },
            forked_from=None
            if forked is None
            else {
                "tenant": forked.tenant,
                "database": forked.database,
                "db_id": forked.db_id,
                "generation": forked.generation,
            },
        ),
        generation=DocumentGeneration(
            generation=generation.generation,
            checkpoint_id=generation.checkpoint_id,
            first_lsn=generation.first_lsn,
            last_lsn=generation.last_lsn,
            readable_from_lsn=database.first_lsn,
            page_count=generation.page_count,
            next_chunk_id=database.next_chunk_id,
            committed_at_us=generation.committed_at_us,
            bytes_uploaded=generation.bytes_uploaded,
            base_chunks=generation.base_chunks,
            delta_chunks=generation.delta_chunks,
            wal_position=database.wal_position.hex(),
        ),
        chunks=tuple(_document_chunk(row, row.blob) for row in chunks if row.blob is not None),
        deltas=tuple(_document_delta(row) for row in deltas),
        drops=tuple(
            DocumentDrop(
                chunk_id=row.chunk_id,
                generation=row.generation,
                first=row.first,
                last=row.last,
                origin_db_id=row.origin_db_id or row.db_id,
            )
            for row in chunks
            if row.blob is None
        ),
    )


def encode_document(document: GenerationDocument) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(msgspec.json.encode(document))


_decoder = msgspec.json.Decoder(GenerationDocument)


def decode_document(data: bytes, *, key: str) -> GenerationDocument:
    """Raises CorruptBlob, or FormatFromFuture for a newer version."""
    try:
        # The library allocates what the frame promises, so the promise is looked at first.
        if zstandard.frame_content_size(data) > DOCUMENT_BYTES_MAX:
            raise CorruptBlob("A generation document of an impossible size.", key=key)
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=DOCUMENT_BYTES_MAX)
    except zstandard.ZstdError as error:
        raise CorruptBlob("A generation document cannot be decompressed.", key=key) from error
    return decode_json_document(
        plain, _decoder, document_format=FORMAT, version_max=VERSION, key=key
    )


def restored_rows(document: GenerationDocument) -> list[ChunkRecord]:
    """The bases and drops that the document was built from (validity still open)."""
    db_id = document.database.db_id
    rows = [
        ChunkRecord(
            db_id=db_id,
            chunk_id=chunk.chunk_id,
            generation=chunk.generation,
            blob=_blob_ref(chunk.blob),
            first=chunk.first,
            last=chunk.last,
            visible_last=chunk.visible_last,
            codec=chunk.codec,
            directory_offset=chunk.directory_offset,
            directory_bytes=chunk.directory_bytes,
            logical_bytes=chunk.logical_bytes,
            count=chunk.count,
            line_safe=chunk.line_safe,
            origin_db_id=chunk.origin_db_id,
        )
        for chunk in document.chunks
    ]
    rows += [
        ChunkRecord(
            db_id=db_id,
            chunk_id=drop.chunk_id,
            generation=drop.generation,
            blob=None,
            first=drop.first,
            last=drop.last,
            visible_last=drop.first - 1,
            origin_db_id=drop.origin_db_id,
        )
        for drop in document.drops
    ]
    return sorted(rows, key=lambda row: row.chunk_id)


def restored_deltas(document: GenerationDocument) -> list[ChunkDeltaRecord]:
    """The deltas that the document was built from (validity still open)."""
    return [
        ChunkDeltaRecord(
            db_id=document.database.db_id,
            chunk_id=delta.chunk_id,
            generation=delta.generation,
            delta_id=delta.delta_id,
            blob=_blob_ref(delta.blob),
            base_key=delta.base_key,
            pages=base64.b64decode(delta.pages),
            codec=delta.codec,
            directory_offset=delta.directory_offset,
            directory_bytes=delta.directory_bytes,
            logical_bytes=delta.logical_bytes,
            count=delta.count,
            origin_db_id=delta.origin_db_id,
        )
        for delta in document.deltas
    ]


def restored_database(document: GenerationDocument, *, floor_lsn: int) -> DatabaseRecord:
    """The descriptor as of the document; LSNs go on at `floor_lsn`."""
    database, generation = document.database, document.generation
    return DatabaseRecord(
        db_id=database.db_id,
        tenant=database.tenant,
        name=database.name,
        engine=database.engine,
        page_size=database.page_size,
        chunk_bytes=database.chunk_bytes,
        compression=database.compression,
        created_at_us=database.created_at_us,
        generation=generation.generation,
        first_lsn=generation.readable_from_lsn,
        floor_lsn=floor_lsn,
        checkpointed_lsn=generation.last_lsn,
        next_chunk_id=generation.next_chunk_id,
        page_count=generation.page_count,
        retention=Retention(**database.retention),  # type: ignore[arg-type]
        # A document holds every chunk: nothing has to fall through to a parent.
        forked_from=None
        if database.forked_from is None
        else ForkParent(**database.forked_from, inherits=False),
        wal_position=bytes.fromhex(generation.wal_position),
    )


def restored_generation(document: GenerationDocument, *, document_key: str) -> GenerationRecord:
    generation = document.generation
    return GenerationRecord(
        db_id=document.database.db_id,
        generation=generation.generation,
        checkpoint_id=generation.checkpoint_id,
        first_lsn=generation.first_lsn,
        last_lsn=generation.last_lsn,
        page_count=generation.page_count,
        committed_at_us=generation.committed_at_us,
        base_chunks=len(document.chunks)
        if generation.base_chunks is None
        else generation.base_chunks,
        delta_chunks=generation.delta_chunks,
        bytes_uploaded=generation.bytes_uploaded,
        document_key=document_key,
        document_stored=True,
    )


def _document_blob(blob: BlobRef) -> DocumentBlob:
    return DocumentBlob(
        key=blob.key, sha256=blob.sha256.hex(), crc64=f"{blob.crc64:016x}", bytes=blob.bytes
    )


def _blob_ref(blob: DocumentBlob) -> BlobRef:
    return BlobRef(
        key=blob.key,
        sha256=bytes.fromhex(blob.sha256),
        crc64=int(blob.crc64, 16),
        bytes=blob.bytes,
    )


def _document_delta(row: ChunkDeltaRecord) -> DocumentDelta:
    return DocumentDelta(
        chunk_id=row.chunk_id,
        generation=row.generation,
        delta_id=row.delta_id,
        blob=_document_blob(row.blob),
        base_key=row.base_key,
        pages=base64.b64encode(row.pages).decode("ascii"),
        codec=row.codec,
        directory_offset=row.directory_offset,
        directory_bytes=row.directory_bytes,
        logical_bytes=row.logical_bytes,
        count=row.count,
        origin_db_id=row.origin_db_id or row.db_id,
    )


def _document_chunk(row: ChunkRecord, blob: BlobRef) -> DocumentChunk:
    return DocumentChunk(
        chunk_id=row.chunk_id,
        generation=row.generation,
        blob=_document_blob(blob),
        first=row.first,
        last=row.last,
        visible_last=row.visible_last,
        codec=row.codec,
        directory_offset=row.directory_offset,
        directory_bytes=row.directory_bytes,
        logical_bytes=row.logical_bytes,
        count=row.count,
        line_safe=row.line_safe,
        origin_db_id=row.origin_db_id or row.db_id,
    )
