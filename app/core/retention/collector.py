"""Collects what is due: dooms what was retired, deletes what has been doomed long enough.

Invariants: I8: nothing is deleted that a row names, or a job in flight. The order is: the last row
goes and the key is doomed in one commit (or a key that no row ever named is, by a commit that
proves it); the grace period; the proof again; the deletion. From the doom on no publication may
name the key. I17: the prefix is confirmed ours before each batch of deletions.
Concurrency: one round at a time. Cancellation, crash: at any `await`; a deletion whose answer was
lost is done again, the key stays doomed until then (I15).
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from app.core.base import failpoints
from app.core.base.events import Events
from app.core.stores.manifest.ops import DoomBlob, ForgetBlob, ManifestBatch, UnretireBlob
from app.core.stores.manifest.records import GcRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from app.core.stores.remote.keys import ChunkKey, DeltaKey, parse_key
from app.core.stores.remote.protocol import RemoteStore

DUE_AT_ONCE = 1000
"""As many as one request deletes."""
RETRY_US = 60 * 1_000_000


class LocalCopies(Protocol):
    async def forget(self, sha256: str) -> None: ...


class Ownership(Protocol):
    async def confirm(self) -> None: ...


@dataclass(slots=True)
class Collected:
    doomed: int = 0
    kept: int = 0
    """Queued, but named by a row or a job after all."""
    deleted: int = 0
    deleted_bytes: int = 0
    failed: int = 0
    """Could not be deleted now; they stay doomed and are tried again."""


class BlobCollector:
    def __init__(
        self,
        manifest: ManifestStore,
        remote: Callable[[], RemoteStore],
        ownership: Ownership,
        *,
        local: LocalCopies,
        events: Events,
        grace_us: int,
    ) -> None:
        self._manifest = manifest
        self._remote = remote
        self._ownership = ownership
        self._local = local
        self._events = events
        self._grace_us = grace_us

    async def collect(self, now_us: int) -> Collected:
        """Everything that is due. Raises RemoteUnavailable, NotReady, OwnershipLost."""
        collected = Collected()
        while due := self._due(now_us):
            doomed = [row for row in due if row.doomed]
            retired = [row for row in due if not row.doomed]
            if retired:
                await self._doom(retired, now_us, collected)
            if doomed:
                await self._delete(doomed, now_us, collected)
        if collected != Collected():
            self._events.info(
                "collection.collected", doomed=collected.doomed, kept=collected.kept,
                blobs=collected.deleted, bytes=collected.deleted_bytes, failed=collected.failed,
            )  # fmt: skip
        return collected

    def _due(self, now_us: int) -> list[GcRecord]:
        with self._manifest.read() as view:
            return [row for row in view.gc_rows(limit=DUE_AT_ONCE) if row.eligible_at_us <= now_us]

    async def _doom(self, rows: Sequence[GcRecord], now_us: int, collected: Collected) -> None:
        """No row names them and no job in flight: proven again inside the transaction as far as
        rows go; a job's keys are its own.
        """
        intended = await self._manifest.read_in_thread(intended_keys)
        failpoints.fp("collect.before_doom")
        ops = tuple(
            UnretireBlob(key=row.key)
            if row.key in intended
            else DoomBlob(key=row.key, eligible_at_us=now_us + self._grace_us)
            for row in rows
        )
        receipt = await self._manifest.commit(ManifestBatch(ops=ops, reason="collection.doomed"))
        doomed = sum(result is True for result in receipt.results)
        collected.doomed += doomed
        collected.kept += len(rows) - doomed

    async def _delete(self, rows: Sequence[GcRecord], now_us: int, collected: Collected) -> None:
        with self._manifest.read() as view:
            failed = {row.key for row in rows if view.blob_references(row.key)}
        for key in sorted(failed):
            self._events.error("collection.unprovable", key=key)
        provable = [row for row in rows if row.key not in failed]
        if provable:
            remote = self._remote()
            await self._ownership.confirm()
            failpoints.fp("collect.before_delete")
            failed.update(await remote.delete_blobs([row.key for row in provable]))
            failpoints.fp("collect.after_delete")
        gone = [row for row in provable if row.key not in failed]
        postponed = tuple(
            DoomBlob(key=key, eligible_at_us=now_us + RETRY_US) for key in sorted(failed)
        )
        await self._manifest.commit(
            ManifestBatch(
                ops=(*(ForgetBlob(key=row.key) for row in gone), *postponed),
                reason="collection.deleted",
            )
        )
        failpoints.fp("collect.after_forget")
        for row in gone:
            match parse_key(row.key):
                case ChunkKey(sha256_hex=sha256) | DeltaKey(sha256_hex=sha256):
                    await self._local.forget(sha256)
                case _:
                    pass
        collected.deleted += len(gone)
        collected.deleted_bytes += sum(row.bytes for row in gone)
        collected.failed += len(failed)
        if failed:
            self._events.warning("collection.not_deleted", keys=sorted(failed)[:10])


def intended_keys(view: ManifestView) -> Collection[str]:
    """The keys that jobs in flight have recorded."""
    return {
        row.blob.key
        for job in view.unfinished_jobs()
        for intent in job.intents
        for row in (intent.row, intent.delta)
        if row is not None and row.blob is not None
    }
