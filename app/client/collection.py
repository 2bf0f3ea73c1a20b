"""Deletion of databases, collection on demand, and why a blob is kept."""

from typing import Any, Literal

from app.client.calls import Calls, decoded
from app.client.databases import database_path
from app.client.wire import Answer, Job

COLLECTION_SECONDS_MAX = 3600.0


class CollectionReport(Answer, frozen=True):
    collection_time: str
    paused: bool
    expired_generations: int
    removed_rows: int
    retired_blobs: int
    retired_bytes: int
    doomed_blobs: int
    deleted_blobs: int
    deleted_bytes: int
    failed_blobs: int
    waiting_blobs: int
    orphans: dict[str, Any] | None


class BlobExplanation(Answer, frozen=True):
    key: str
    state: str
    eligible_at: str | None
    reasons: list[dict[str, Any]]


class Collection:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def delete_database(
        self, tenant: str, database: str, *, with_snapshots: bool = False
    ) -> Job:
        """The job that removes what the database leaves; its name is free on return."""
        response = await self._calls.send(
            "DELETE",
            database_path(tenant, database),
            params={"snapshots": "delete"} if with_snapshots else {},
        )
        return decoded(response, Job)

    async def run(
        self,
        *,
        orphans: Literal["report", "delete"] | None = None,
        accept_clock: bool = False,
    ) -> CollectionReport:
        """Retention now, and all that is due. Takes as long as there are objects to delete."""
        response = await self._calls.send(
            "POST",
            "/admin/gc/run",
            json={"orphans": orphans, "accept_clock": accept_clock},
            wait_seconds=COLLECTION_SECONDS_MAX,
        )
        return decoded(response, CollectionReport)

    async def explain(self, key: str) -> BlobExplanation:
        return await self._calls.get("/debug/blobs/explain", BlobExplanation, params={"key": key})
