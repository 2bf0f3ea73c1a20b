"""What the planner of libsql needs to know, read before it plans: which pages really changed.

A page whose content equals that of the generation before is not dirty: SQLite writes pages that
come out as they were, and an image sent twice changes nothing. Compared are digests (SHA-256 cut
to 128 bits), which each blob keeps apart from its pages.

Invariants: I5: only up to the last commit of the sealed WAL. I7: what is found here goes into the
persisted plan, so that a retry finds nothing else. I11: a window of the WAL, and the digests of one
chunk's blobs, at a time. Cancellation: at any await; nothing is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap

from app.core.base.errors import BopError, InvariantViolation
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.checkpoint.page_reading import WalWindow, read_wal_window, windows
from app.core.engines.base import ChunkState, PageChanges
from app.core.formats.frame_run import pack_footer
from app.core.formats.page_codec import (
    DIGEST,
    Digests,
    make_patch,
    page_digests,
)
from app.core.formats.sqlite_wal import lock_byte_page
from app.core.reads.delta_chain import BaseLayer, DeltaChain
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import ReadPoint
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.manifest.records import ChunkDeltaRecord, ChunkRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.wal.log import WalLog
from app.core.stores.wal.page_index import WalPageIndex
from app.core.stores.wal.segments import SegmentInfo

SAMPLE_PAGES = 64
"""Of a chunk's dirty pages, encoded to see how large their delta would become."""
DIRECTORY_BYTES_PER_PAGE = 28

PageNos = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningParts:
    manifest: ManifestStore
    pages: PageStore
    hot_cache: HotCache
    pool: BlockingPool
    events: Events


def committed_segments(
    segments: Sequence[SegmentInfo], index: WalPageIndex
) -> tuple[SegmentInfo, ...]:
    """Those up to the last commit that ends a segment: a request that began after the seal may
    have sealed another in its midst (I5).
    """
    kept = list(segments)
    while kept:
        commit = index.commit_at(kept[-1].last_lsn)
        if commit is not None and commit.lsn == kept[-1].last_lsn:
            break
        kept.pop()
    return tuple(kept)


async def load_changes(
    parts: PlanningParts, log: WalLog, segments: Sequence[SegmentInfo], *, db_id: int
) -> PageChanges:
    """What `segments` (not empty, whole transactions) change. Raises CorruptWal, CorruptBlob,
    RemoteUnavailable.
    """
    index = await log.frames.read()
    first_lsn, last_lsn = segments[0].first_lsn, segments[-1].last_lsn
    footer = await log.frames.footer_at(last_lsn)
    with await parts.pages.point(db_id, lsn=last_lsn) as point:
        if point.lsn != last_lsn:
            raise InvariantViolation("sealed WAL that does not end a transaction", db_id=db_id)
        at = point.generation
        published, states, rows = await parts.manifest.read_in_thread(
            lambda view: (
                view.generation(db_id, at), view.chunk_states(db_id, at), view.delta_view(db_id, at)
            )
        )  # fmt: skip
        deltas = _deltas_by_chunk(rows)
        valid = {row.chunk_id: row for row in states}  # bases and drops
        lowest = index.lowest_page_count(first_lsn, last_lsn)
        low = min(
            point.page_count,
            published.page_count if published is not None else 0,
            point.page_count if lowest is None else lowest,
        )
        written, _ = index.newest(first_lsn, last_lsn)
        touched = BitMap(written[written <= point.page_count])
        touched |= BitMap(range(low + 1, point.page_count + 1))
        touched.discard(lock_byte_page(point.page_size))
        chunks: list[ChunkState] = []
        per_chunk = point.pages_per_chunk
        chunk_count = -(-point.page_count // per_chunk)
        for chunk_id in _chunks_of(touched, per_chunk=per_chunk):
            pages = touched & BitMap(
                range(chunk_id * per_chunk + 1, (chunk_id + 1) * per_chunk + 1)
            )
            chunks.append(
                await _load_chunk(
                    parts, point, pages,
                    chunk_id=chunk_id, base=valid.get(chunk_id),
                    deltas=tuple(deltas.get(chunk_id, ())), low_page_count=low,
                )
            )  # fmt: skip
        for chunk_id, row in valid.items():
            if chunk_id >= chunk_count and row.blob is not None:
                chunks.append(
                    ChunkState(
                        chunk_id=chunk_id, base=row, deltas=tuple(deltas.get(chunk_id, ())),
                        dirty=BitMap().serialize(), delta_bytes=0, base_at_hand=False,
                    )
                )  # fmt: skip
    return PageChanges(
        last_lsn=last_lsn,
        page_count=point.page_count,
        low_page_count=low,
        chunks=tuple(sorted(chunks, key=lambda chunk: chunk.chunk_id)),
        wal_position=b"" if footer is None else pack_footer(footer),
    )


async def _load_chunk(
    parts: PlanningParts,
    point: ReadPoint,
    pages: BitMap,
    *,
    chunk_id: int,
    base: ChunkRecord | None,
    deltas: tuple[ChunkDeltaRecord, ...],
    low_page_count: int,
) -> ChunkState:
    if base is None or base.blob is None:  # it will be written whole: nothing to compare
        return ChunkState(
            chunk_id=chunk_id, base=base, deltas=deltas, dirty=pages.serialize(),
            delta_bytes=0, base_at_hand=False,
        )  # fmt: skip
    chain = parts.pages.chain(point, chunk_id)
    known = await _load_digests(parts, chain, pages)
    dirty = BitMap()
    sample: dict[int, bytes] = {}
    stride = max(1, len(pages) // SAMPLE_PAGES)
    for page_nos in windows(pages, page_size=point.page_size):
        window = await read_wal_window(point, page_nos, low_page_count=low_page_count)
        changed = await parts.pool.run(_changed_blocking, window, known, low_page_count)
        dirty |= BitMap(page_nos[changed])
        for row in np.flatnonzero(changed).tolist()[::stride]:
            sample[int(page_nos[row])] = window.pages[row].tobytes()
    at_hand = base.blob.sha256.hex() in parts.hot_cache
    return ChunkState(
        chunk_id=chunk_id,
        base=base,
        deltas=deltas,
        dirty=dirty.serialize(),
        delta_bytes=await _estimate(parts, chain, sample, pages=len(dirty), at_hand=at_hand),
        base_at_hand=at_hand,
    )


async def _load_digests(parts: PlanningParts, chain: DeltaChain, pages: BitMap) -> "_Known":
    """The digests of `pages` as of the generation before. What cannot be read is not known, and
    such a page counts as changed.
    """
    known = _Known(pages)
    for layer in reversed(chain.layers):  # newer ones overwrite
        try:
            blob = await parts.pages.open_layer(layer)
            try:
                digests = np.frombuffer(await blob.read_digests(), dtype=DIGEST)
                known.put(blob.page_nos, digests)
            finally:
                blob.close()
        except BopError as error:
            parts.events.warning(
                "checkpoint.digests_unknown", chunk_id=chain.chunk_id, key=layer.blob.key,
                detail=str(error),
            )  # fmt: skip
            if isinstance(layer, BaseLayer):
                continue
            known.forget(layer.pages)
    return known


class _Known:
    """Digests of some pages, as they become known."""

    def __init__(self, pages: BitMap) -> None:
        self._page_nos = np.array(pages.to_array(), dtype=np.uint32)
        self._digests: Digests = np.zeros(len(self._page_nos), dtype=DIGEST)
        self._is_known = np.zeros(len(self._page_nos), dtype=np.bool_)

    def put(self, page_nos: PageNos, digests: Digests) -> None:
        at = np.minimum(np.searchsorted(page_nos, self._page_nos), len(page_nos) - 1)
        hits = page_nos[at] == self._page_nos
        self._digests[hits] = digests[at[hits]]
        self._is_known[hits] = True

    def forget(self, pages: BitMap) -> None:
        self._is_known[np.isin(self._page_nos, np.array(pages.to_array(), dtype=np.uint32))] = False

    def equal(self, page_nos: PageNos, digests: Digests) -> npt.NDArray[np.bool_]:
        at = np.searchsorted(self._page_nos, page_nos)
        same: npt.NDArray[np.bool_] = (self._digests[at] == digests) & self._is_known[at]
        return same


def _changed_blocking(
    window: WalWindow, known: _Known, low_page_count: int
) -> npt.NDArray[np.bool_]:
    found = page_digests(window.data, page_size=window.pages.shape[1])
    digests = np.frombuffer(b"".join(found), dtype=DIGEST)
    # What lies above the old end is always written: an older page may lie below it in a blob.
    return ~known.equal(window.page_nos, digests) | (window.page_nos > low_page_count)


async def _estimate(
    parts: PlanningParts, chain: DeltaChain, sample: dict[int, bytes], *, pages: int, at_hand: bool
) -> int:
    """About how many bytes a delta of so many dirty pages takes."""
    if not sample:
        return 0
    base_pages: dict[int, bytes] = {}
    base = chain.layers[-1]
    if at_hand and isinstance(base, BaseLayer):
        page_nos = np.array([page for page in sorted(sample) if base.has(page)], dtype=np.uint32)
        if len(page_nos):
            blob = await parts.pages.open_layer(base)
            try:
                rows = await blob.read(page_nos)
            finally:
                blob.close()
            base_pages = {page: rows[at].tobytes() for at, page in enumerate(page_nos.tolist())}
    taken = await parts.pool.run(_encoded_bytes_blocking, sample, base_pages)
    return pages * DIRECTORY_BYTES_PER_PAGE + taken * pages // len(sample)


def _encoded_bytes_blocking(sample: dict[int, bytes], base_pages: dict[int, bytes]) -> int:
    nothing = bytes(len(next(iter(sample.values()))))
    return sum(len(make_patch(page, base_pages.get(no, nothing))) for no, page in sample.items())


def _deltas_by_chunk(rows: Sequence[ChunkDeltaRecord]) -> dict[int, list[ChunkDeltaRecord]]:
    found: dict[int, list[ChunkDeltaRecord]] = {}
    for row in rows:
        found.setdefault(row.chunk_id, []).append(row)
    return found


def _chunks_of(pages: BitMap, *, per_chunk: int) -> list[int]:
    numbers = np.array(pages.to_array(), dtype=np.int64)
    return [int(chunk_id) for chunk_id in np.unique((numbers - 1) // per_chunk)]
