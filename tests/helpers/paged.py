"""A libsql database put together by hand: published blobs, WAL frames, and a store to read it."""

import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pyroaring import BitMap

from app.core.base.clock import SeededRandomness, SystemClock
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.formats.codecs import CodecName
from app.core.formats.container import ContainerKind, LogIdentity
from app.core.formats.frame_run import FrameFooter, pack_footer, pack_frame_header
from app.core.formats.page_blob_writer import PageBatch, PageBlobSpec
from app.core.formats.segment import EngineCode, EntryType
from app.core.reads.page_cache import PageCache
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import GenerationPins, ReadPoint
from app.core.stores.local.directory_files import DirectoryFiles
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.manifest import ops
from app.core.stores.manifest.records import (
    BlobRef,
    ChunkDeltaRecord,
    ChunkRecord,
    GenerationRecord,
)
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.requests import AppendRequest
from app.core.stores.wal.segments import LogConfig
from app.core.stores.wal.store import WalStore
from migrations.runner import load_steps
from tests.helpers.memory_remote import MemoryRemote
from tests.helpers.page_blob_file import write_pages_blocking

MIB = 1024 * 1024
Pages = Mapping[int, bytes]


class HeldPages:
    """The base of patches, in memory."""

    def __init__(self, sha256: bytes, pages: Pages) -> None:
        self.sha256 = sha256
        self._pages = pages

    def read_blocking(self, page_nos: Any) -> dict[int, bytes]:
        return {one: self._pages[one] for one in page_nos.tolist() if one in self._pages}


@dataclass(frozen=True, kw_only=True)
class Frames:
    """One entry, which is a whole request."""

    page_size: int
    pages: list[tuple[int, bytes]]
    commit_sizes: Any
    footer: FrameFooter
    line_safe: bool = False

    @property
    def page_nos(self) -> Any:
        return np.array([number for number, _ in self.pages], dtype=np.uint32)

    @property
    def count(self) -> int:
        return len(self.pages)

    @property
    def payload_bytes(self) -> int:
        return len(self.load_blocking())

    def load_blocking(self) -> bytes:
        frames = [
            pack_frame_header(number, commit_size=int(size)) + page
            for (number, page), size in zip(self.pages, self.commit_sizes, strict=True)
        ]
        return b"".join(frames) + pack_footer(self.footer)


@dataclass
class PagedDatabase:
    """`content` is what its newest state must read as, `history` what each generation must."""

    db_id: int
    page_size: int
    chunk_bytes: int
    codec: CodecName
    manifest: ManifestStore
    wal: WalStore
    remote: MemoryRemote
    hot_cache: HotCache
    cache: PageCache
    pins: GenerationPins
    store: PageStore
    work: Path
    told: list[tuple[str, dict[str, object]]]
    kept: DirectoryFiles
    content: dict[int, bytes] = field(default_factory=dict)
    page_count: int = 0
    generation: int = 0
    lsn: int = 0
    history: dict[int, tuple[int, dict[int, bytes]]] = field(default_factory=dict)
    bases: dict[int, tuple[BlobRef, dict[int, bytes]]] = field(default_factory=dict)

    @property
    def pages_per_chunk(self) -> int:
        return self.chunk_bytes // self.page_size

    # --- writing

    async def append(self, pages: Pages, *, page_count: int | None = None) -> None:
        """A transaction through the WAL."""
        count = page_count if page_count is not None else max([self.page_count, *pages])
        order = list(pages.items())
        sizes = np.zeros(len(order), dtype=np.uint32)
        sizes[-1] = count
        payload = Frames(
            page_size=self.page_size, pages=order, commit_sizes=sizes,
            footer=FrameFooter(page_count=count),
        )  # fmt: skip
        appended = await self.wal.log(self.db_id).append(
            AppendRequest(entries=[payload], entry_type=EntryType.FRAMES)
        )
        self.lsn = appended.last_lsn
        self.set(pages, page_count=count)

    def set(self, pages: Pages, *, page_count: int) -> None:
        self.content.update(pages)
        self.content = {one: page for one, page in self.content.items() if one <= page_count}
        self.page_count = page_count

    async def put_blob(
        self,
        pages: Pages,
        *,
        kind: ContainerKind,
        chunk_id: int,
        delta_id: int = 0,
        base: HeldPages | None = None,
        local: bool = True,
    ) -> tuple[BlobRef, Any]:
        numbers = sorted(pages)
        batch = PageBatch(
            page_nos=np.array(numbers, dtype=np.uint32),
            data=memoryview(b"".join(pages[one] for one in numbers)),
        )
        path = self.work / "blob"
        spec = PageBlobSpec(
            kind=kind, codec=self.codec, page_size=self.page_size, delta_id=delta_id,
            identity=LogIdentity(
                db_id=self.db_id, chunk_id=chunk_id, generation=self.generation + 1
            ),
        )  # fmt: skip
        summary = write_pages_blocking(path, spec, [batch], base=base)
        key = f"{kind.name}-{chunk_id}-{self.generation + 1}-{summary.sha256.hex()}"
        blob = BlobRef(key=key, sha256=summary.sha256, crc64=summary.crc64, bytes=summary.bytes)
        self.remote.objects[key] = path.read_bytes()
        if local:
            await self.hot_cache.admit_link(path, sha256=blob.sha256.hex(), size_bytes=blob.bytes)
        path.unlink()
        return blob, summary

    async def publish(
        self,
        *,
        rewrites: Mapping[int, Pages] = {},
        deltas: Mapping[int, Pages] = {},
        page_count: int | None = None,
        patched: bool = True,
        superseded: tuple[ops.Op, ...] = (),
        local: bool = True,
        last_lsn: int | None = None,
    ) -> None:
        """The next generation: bases of these chunks' pages, deltas of those."""
        generation = self.generation + 1
        batch: list[ops.Op] = []
        for chunk_id, pages in rewrites.items():
            blob, summary = await self.put_blob(
                pages, kind=ContainerKind.PAGES, chunk_id=chunk_id, local=local
            )
            batch.append(
                ops.UpsertChunk(
                    row=ChunkRecord(
                        db_id=self.db_id, chunk_id=chunk_id, generation=generation, blob=blob,
                        first=min(pages), last=max(pages), visible_last=max(pages),
                        codec=self.codec, directory_offset=summary.directory_offset,
                        directory_bytes=summary.directory_bytes,
                        logical_bytes=summary.raw_bytes, count=len(pages),
                    )
                )
            )  # fmt: skip
            self.bases[chunk_id] = (blob, dict(pages))
        for chunk_id, pages in deltas.items():
            base = None
            if patched and chunk_id in self.bases:
                held = self.bases[chunk_id]
                base = HeldPages(held[0].sha256, held[1])
            blob, summary = await self.put_blob(
                pages, kind=ContainerKind.DELTA, chunk_id=chunk_id, delta_id=generation,
                base=base, local=local,
            )  # fmt: skip
            batch.append(
                ops.UpsertChunkDelta(
                    row=ChunkDeltaRecord(
                        db_id=self.db_id, chunk_id=chunk_id, generation=generation,
                        delta_id=generation, blob=blob,
                        base_key=self.bases[chunk_id][0].key if base is not None else "",
                        pages=BitMap(pages).serialize(), codec=self.codec,
                        directory_offset=summary.directory_offset,
                        directory_bytes=summary.directory_bytes,
                        logical_bytes=summary.raw_bytes, count=len(pages),
                    )
                )
            )  # fmt: skip
        for pages in [*rewrites.values(), *deltas.values()]:
            self.content.update(pages)
        count = page_count if page_count is not None else max([self.page_count, *self.content])
        self.set({}, page_count=count)
        self.lsn = max(self.lsn, generation) if last_lsn is None else last_lsn
        row = GenerationRecord(
            db_id=self.db_id, generation=generation, checkpoint_id=f"c{generation}", first_lsn=1,
            last_lsn=self.lsn, page_count=count, committed_at_us=1_000_000 * generation,
            base_chunks=1, delta_chunks=0, bytes_uploaded=0, document_key=f"g{generation}",
        )  # fmt: skip
        await self.manifest.commit(
            ops.ManifestBatch(
                ops=(*batch, *superseded, ops.PublishGeneration(row=row, next_chunk_id=0)),
                reason="test", db_id=self.db_id,
            )
        )  # fmt: skip
        self.generation = generation
        self.history[generation] = (count, dict(self.content))

    # --- reading

    async def read_all(self, point: ReadPoint, **bounds: int) -> bytes:
        first, last = bounds.get("first", 1), bounds.get("last", point.page_count)
        pieces, at = [], first
        async for run in self.store.iter_pages(point, first, last):
            assert run.first == at
            assert len(run.data) == run.count * self.page_size
            at += run.count
            pieces.append(bytes(run.data))
        assert at == last + 1
        return b"".join(pieces)

    def expected(self, generation: int | None = None) -> bytes:
        count, pages = (
            (self.page_count, self.content) if generation is None else self.history[generation]
        )
        zeros = bytes(self.page_size)
        return b"".join(pages.get(one, zeros) for one in range(1, count + 1))


class NoCatalog:
    """Segments of which no row is kept."""

    def register_blocking(self, **_: Any) -> None: ...

    def seal_blocking(self, info: Any) -> None: ...


def made_page(seed: int, size: int) -> bytes:
    """Compressible, and different for each seed."""
    source = random.Random(seed)
    words = [source.randbytes(8) for _ in range(16)]
    return b"".join(source.choice(words) for _ in range(size // 8))


def fail(error: BaseException) -> None:
    raise error


@asynccontextmanager
async def paged_database(
    work: Path,
    *,
    page_size: int = 512,
    chunk_bytes: int = 65536,
    codec: CodecName = "zstd",
    page_cache_bytes: int = MIB,
    hot_cache_bytes: int = 64 * MIB,
    directory_cache_bytes: int = 0,
    **options: Any,
) -> AsyncIterator[PagedDatabase]:
    async with AsyncExitStack() as stack:
        clock, told = SystemClock(), []
        events = Events(lambda name, _, fields: told.append((name, dict(fields))))
        manifest = await ManifestStore.open(
            work / "manifest", clock=clock, events=events, process_id="p", map_bytes=64 * MIB,
            max_readers=16, on_fatal=fail, migrations=load_steps(),
            randomness=SeededRandomness(3),
        )  # fmt: skip
        stack.push_async_callback(manifest.aclose)
        pool = BlockingPool("test", threads=4)
        stack.callback(pool.close_blocking)
        receipt = await manifest.commit(
            ops.ManifestBatch(
                ops=(
                    ops.CreateDatabase(
                        tenant="acme", name="db", engine="libsql", page_size=page_size,
                        chunk_bytes=chunk_bytes, compression=codec, created_at_us=1,
                    ),
                ),
                reason="test",
            )
        )  # fmt: skip
        db_id = receipt.results[0]
        wal = WalStore(work / "wal", clock=clock, events=events, catalog=NoCatalog(), on_fatal=fail)
        stack.push_async_callback(wal.aclose)
        await wal.open_log(
            LogConfig(
                db_id=db_id, engine=EngineCode.LIBSQL, chunk_bytes=chunk_bytes, floor_lsn=1,
                page_size=page_size,
            ),
            (),
        )  # fmt: skip
        hot_cache = await HotCache.open(
            work / "hot", limit_bytes=hot_cache_bytes, pool=pool, events=events
        )
        kept = await DirectoryFiles.open(
            work / "directories", limit_bytes=directory_cache_bytes, pool=pool, events=events
        )
        remote, cache = MemoryRemote(), PageCache(limit_bytes=page_cache_bytes)
        pins = GenerationPins()
        store = await stack.enter_async_context(
            PageStore(
                manifest, wal, remote=lambda: remote, hot_cache=hot_cache, cache=cache, pins=pins,
                pool=pool, clock=clock, events=events, kept_directories=kept, **options,
            )
        )  # fmt: skip
        yield PagedDatabase(
            db_id=db_id, page_size=page_size, chunk_bytes=chunk_bytes, codec=codec,
            manifest=manifest, wal=wal, remote=remote, hot_cache=hot_cache, cache=cache,
            pins=pins, store=store, work=work, told=told, kept=kept,
        )  # fmt: skip
