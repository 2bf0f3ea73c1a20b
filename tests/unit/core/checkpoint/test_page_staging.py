"""The making of page blobs, as far as the job's stall detector looks at it."""

from pathlib import Path

import pytest

from app.core.base.tasks import BlockingPool
from app.core.checkpoint import page_staging
from app.core.checkpoint.page_staging import PageStaging
from app.core.checkpoint.staging import KeyScope
from app.core.engines.base import CheckpointPlan, PageAction, RewriteBase
from tests.helpers.paged import PagedDatabase, made_page, paged_database

PAGE, PAGES = 4096, 512
WINDOW_PAGES = 16
CHECKPOINT = "0000000001-000001-01JDB4N0Z8Q3V5W7X9Y1A2B3C4"


async def touches_of(db: PagedDatabase, action: PageAction, target: Path) -> int:
    plan = CheckpointPlan(
        engine="libsql", db_id=db.db_id, checkpoint_id=CHECKPOINT, epoch=1,
        expected_generation=db.generation, first_lsn=1, last_lsn=db.lsn, page_count=db.page_count,
        next_chunk_id=1, codec="zstd", actions=(action,), low_page_count=db.page_count,
    )  # fmt: skip
    touches = 0

    def touch() -> None:
        nonlocal touches
        touches += 1

    pool = BlockingPool("staging", threads=2)
    try:
        with await db.store.point(db.db_id) as point:
            staging = PageStaging(
                plan=plan, point=point, pages=db.store, pool=pool, threads=1,
                scope=KeyScope(tenant="acme", database="db"), touch=touch,
            )  # fmt: skip
            row = await staging.stage(action, target)
    finally:
        pool.close_blocking()
    assert row.blob is not None
    return touches


async def test_every_window_of_a_base_counts_as_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(page_staging, "WINDOW_BYTES", PAGE * WINDOW_PAGES)
    async with paged_database(tmp_path, page_size=PAGE, chunk_bytes=PAGE * PAGES) as db:
        await db.append({number: made_page(number, PAGE) for number in range(1, PAGES + 1)})
        action = RewriteBase(
            chunk_id=0, first_page=1, last_page=PAGES, supersedes_base=None, supersedes_deltas=(),
            staged_bytes_max=2 * PAGE * PAGES,
        )  # fmt: skip
        assert await touches_of(db, action, tmp_path / "base") >= PAGES // WINDOW_PAGES
