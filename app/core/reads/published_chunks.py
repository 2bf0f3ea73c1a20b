"""The chunks of a long log, a page of rows at a time.

Invariants: I11: one page in memory. The caller has pinned the generation: its rows stay, so that
pages read one after the other are of one moment.
Concurrency: rows are read in the manifest's pool; the event loop is held by none of it.
Cancellation, crash: nothing is kept.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from app.core.reads.paged_plan import ChunkPage
from app.core.stores.manifest.records import ChunkRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView

PAGE_ROWS = 512


@dataclass(frozen=True, slots=True)
class PublishedChunks:
    manifest: ManifestStore
    db_id: int
    generation: int

    async def pages(self, lsn: int) -> AsyncGenerator[ChunkPage, None]:
        """See `ChunkPages`."""
        while True:
            rows = await self._read(lsn)
            is_last = len(rows) < PAGE_ROWS
            yield ChunkPage(rows, is_last=is_last)
            if is_last:
                return
            lsn = rows[-1].last + 1

    async def _read(self, lsn: int) -> list[ChunkRecord]:
        def read_blocking(view: ManifestView) -> list[ChunkRecord]:
            return view.chunk_page(self.db_id, self.generation, lsn, limit=PAGE_ROWS)

        return await self.manifest.read_in_thread(read_blocking)
