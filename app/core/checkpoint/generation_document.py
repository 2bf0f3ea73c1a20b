"""The generation document: what the bucket says of one generation, whole.

zstd-compressed JSON under `generations/{tenant}/{database}/{db_id}/{generation:010d}.json.zst`. It
holds the database's descriptor and every valid chunk row, so that the bucket alone restores what
was published (I3). Hashes are lower-case hex, timestamps microseconds since the Unix epoch.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import zstandard

from app.core.base.errors import CorruptBlob, FormatFromFuture
from app.core.stores.manifest.records import (
    BlobRef,
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


class GenerationDocument(msgspec.Struct, frozen=True, kw_only=True):
    format: str = FORMAT
    version: int = VERSION
    database: DocumentDatabase
    generation: DocumentGeneration
    chunks: tuple[DocumentChunk, ...]

    def says_the_same_as(self, other: "GenerationDocument") -> bool:
        """True if both are the one publication. The descriptor's settings may have changed since
        the first attempt to store it; the generation and its chunks cannot.
        """
        return self.generation == other.generation and self.chunks == other.chunks


def build_document(
    database: DatabaseRecord, generation: GenerationRecord, chunks: Sequence[ChunkRecord]
) -> GenerationDocument:
    """Pure. `chunks` are the rows valid at `generation`, in chunk order, drops left out."""
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
        ),
        chunks=tuple(_document_chunk(row, row.blob) for row in chunks if row.blob is not None),
    )


def encode_document(document: GenerationDocument) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(msgspec.json.encode(document))


def decode_document(data: bytes, *, key: str) -> GenerationDocument:
    """Raises CorruptBlob, or FormatFromFuture for a newer version."""
    try:
        plain = zstandard.ZstdDecompressor().decompress(data, max_output_size=DOCUMENT_BYTES_MAX)
        head = msgspec.json.decode(plain)
        if head.get("format") == FORMAT and head.get("version", 0) > VERSION:
            raise FormatFromFuture("A generation document is of a newer version.", key=key)
        document = msgspec.convert(head, GenerationDocument)
    except (zstandard.ZstdError, msgspec.MsgspecError, AttributeError) as error:
        raise CorruptBlob("A generation document cannot be read.", key=key) from error
    if document.format != FORMAT:
        raise CorruptBlob("Not a generation document.", key=key)
    return document


def restored_rows(document: GenerationDocument) -> list[ChunkRecord]:
    """The catalogue rows that the document was built from (validity still open)."""
    db_id = document.database.db_id
    return [
        ChunkRecord(
            db_id=db_id,
            chunk_id=chunk.chunk_id,
            generation=chunk.generation,
            blob=BlobRef(
                key=chunk.blob.key,
                sha256=bytes.fromhex(chunk.blob.sha256),
                crc64=int(chunk.blob.crc64, 16),
                bytes=chunk.blob.bytes,
            ),
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
        forked_from=None if database.forked_from is None else ForkParent(**database.forked_from),
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
        base_chunks=len(document.chunks),
        delta_chunks=0,
        bytes_uploaded=generation.bytes_uploaded,
        document_key=document_key,
        document_stored=True,
    )


def _document_chunk(row: ChunkRecord, blob: BlobRef) -> DocumentChunk:
    return DocumentChunk(
        chunk_id=row.chunk_id,
        generation=row.generation,
        blob=DocumentBlob(
            key=blob.key, sha256=blob.sha256.hex(), crc64=f"{blob.crc64:016x}", bytes=blob.bytes
        ),
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
