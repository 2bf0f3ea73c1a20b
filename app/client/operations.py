"""What an operator looks at: readiness, leases, jobs at work, the manifest, fsck."""

from collections.abc import AsyncGenerator
from typing import Any

from app.client.calls import Calls, decoded
from app.client.wire import Change, FsckReport, Job, Lease, Readiness

FSCK_SECONDS_MAX = 3600.0


class Operations:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def readiness(self) -> Readiness:
        """Also of a service that is not ready: that is an answer, not a failure."""
        response = await self._calls.send("GET", "/readyz", accepted=frozenset({503}))
        return decoded(response, Readiness)

    def leases(self, *, limit: int | None = None) -> AsyncGenerator[Lease, None]:
        return self._calls.pages("/debug/checkpoint/leases", Lease, params={}, limit=limit)

    def active_jobs(self, *, limit: int | None = None) -> AsyncGenerator[Job, None]:
        return self._calls.pages("/debug/checkpoint/active_jobs", Job, params={}, limit=limit)

    def change_log(
        self, *, after: int = 0, limit: int | None = None
    ) -> AsyncGenerator[Change, None]:
        """Oldest first, from the sequence behind `after`."""
        return self._calls.pages(
            "/debug/manifest/change_log", Change, params={"after": after}, limit=limit
        )

    async def manifest_stats(self) -> dict[str, Any]:
        return await self._calls.get("/debug/manifest/stats", dict[str, Any])

    async def fsck(self) -> FsckReport:
        """Checks the running service; takes as long as it has blobs to ask for."""
        response = await self._calls.send(
            "GET", "/debug/manifest/fsck", wait_seconds=FSCK_SECONDS_MAX
        )
        return decoded(response, FsckReport)
