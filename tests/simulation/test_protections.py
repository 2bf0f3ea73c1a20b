"""What the simulation is worth: each of these takes one protection away, and it must notice."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import app.core.checkpoint.page_staging as page_staging
import app.core.formats.sqlite_wal_scanner as sqlite_wal_scanner
import app.core.services.recovery as recovery
import app.core.stores.wal.writer as wal_writer
import app.core.workers.job_loop as job_loop
from app.core.base.errors import BopError, FatalError, OutcomeUnknown, StorageFailure
from app.core.checkpoint.executor import CheckpointExecutor
from app.core.reads.blob_check import BlobCheck, Verdict
from app.core.retention.orphans import Known
from app.core.stores.local.cache_files import CacheFiles
from app.core.stores.remote.protocol import BlobInfo, Body
from app.core.stores.remote.retrying import Retrying
from app.core.stores.wal.remembered import RememberedAppends
from tests.simulation.bucket import Violation
from tests.simulation.disk import DiskRates
from tests.simulation.seed import run_seed

SEEDS_UNTIL_SEEN = 60

# --- of requests and jobs


async def _keep_the_reservation(executor: Any, hold: Any) -> None:
    await executor._parts.scratch.remove(hold.job.job_id)
    executor._parts.quota.forget_scratch(hold.job.job_id)


async def _believe_that_unknown_is_done(store: Any, key: str, body: Body) -> BlobInfo:
    try:
        return await store._inner.put_blob(key, body)  # type: ignore[no-any-return]
    except OutcomeUnknown:
        return BlobInfo(key=key, bytes=body.bytes, crc64=body.crc64, etag="", modified_at_us=0)


# --- of the disk

_sync = wal_writer.LogWriter._sync


def _believe_in_a_failed_sync(writer: Any, targets: Any) -> None:
    with suppress(StorageFailure):
        _sync(writer, targets)


def _take_want_of_room_for_a_failure(error: OSError, **_: object) -> StorageFailure:
    return StorageFailure(f"A write to the WAL failed: {error}")


@contextmanager
def _end_on_any_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFailure(f"{path}: {error}") from error


class _NeverRaised(Exception):
    """What is caught instead."""


_link = CacheFiles.link_blocking


def _end_for_want_of_a_copy(files: Any, source: Path, sha256: str, size_bytes: int) -> Any:
    try:
        return _link(files, source, sha256, size_bytes)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageFailure(f"{source}: {error}") from error
        raise


# --- of reads


async def _find_all_blobs_right(check: Any, blob: Any, turn: Any) -> Verdict:
    await turn(blob.bytes)
    return Verdict(outcome="ok")


def _link_all_frames(rows: Any, **_: object) -> Any:
    return np.ones(len(rows), dtype=np.bool_)


def _end_rows_at_documents(views: Any) -> list[Any]:
    """As it was once: what expired between two documents was not thought of."""
    rows: dict[tuple[int, int], Any] = {}
    open_rows: set[tuple[int, int]] = set()
    for generation, view in views:
        here = {(row.chunk_id, row.generation): row for row in view}
        for gone in open_rows - here.keys():
            rows[gone] = msgspec.structs.replace(rows[gone], superseded_at=generation)
        rows.update({place: row for place, row in here.items() if place not in rows})
        open_rows = set(here)
    return [rows[place] for place in sorted(rows)]


PROTECTIONS: dict[str, tuple[Any, str, Any]] = {
    "reservations are given back": (CheckpointExecutor, "_clean_up", _keep_the_reservation),
    "keys are remembered": (RememberedAppends, "get", lambda appends, key: None),
    "unknown is not done": (Retrying, "put_blob", _believe_that_unknown_is_done),
    "the sweep asks the manifest": (Known, "holds", lambda known, key: False),
    "a failed sync acknowledges nothing": (
        wal_writer.LogWriter, "_sync", _believe_in_a_failed_sync,
    ),
    "a full disk under the WAL ends nothing": (
        wal_writer, "judge_write", _take_want_of_room_for_a_failure,
    ),
    "a full disk under the manifest ends nothing": (job_loop, "BopError", _NeverRaised),
    "a full disk under scratch is told as such": (
        page_staging, "disk_errors", _end_on_any_error,
    ),
    "the cache does without": (CacheFiles, "link_blocking", _end_for_want_of_a_copy),
    "verification reads": (BlobCheck, "check", _find_all_blobs_right),
    "frames are linked by checksums": (sqlite_wal_scanner, "linked", _link_all_frames),
    "what recover knows not it does not guess": (
        recovery, "_with_validity", _end_rows_at_documents,
    ),
}  # fmt: skip


FIRST_SEEDS = {
    "a full disk under the manifest ends nothing": 29,
    "the cache does without": 7,
    "frames are linked by checksums": 3,
    "what recover knows not it does not guess": 2,
}
"""Those before did not notice: only the time is saved. Where all has changed, a later one does."""

MORE_OFTEN = {"a failed sync acknowledges nothing": {"failed_sync": 0.02, "frail_lives": 1.0}}
"""Faults so rare otherwise that most seeds see none: a disk that failed is not used again."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_protection_taken_away_is_seen(
    place: Path, monkeypatch: pytest.MonkeyPatch, protection: str
) -> None:
    monkeypatch.setattr(*PROTECTIONS[protection])
    for rate, value in MORE_OFTEN.get(protection, {}).items():
        monkeypatch.setitem(DiskRates.__init__.__kwdefaults__, rate, value)
    for seed in range(FIRST_SEEDS.get(protection, 0), SEEDS_UNTIL_SEEN):
        try:
            run_seed(seed, place)
        except (Violation, BopError, FatalError, OSError) as error:
            print(f"seed {seed}: {error!r}")
            return
    pytest.fail(f"{SEEDS_UNTIL_SEEN} seeds did not notice")
