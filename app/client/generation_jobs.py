"""Verifications and downloads: ask for one; look at them and wait for them as for any job."""

from app.client.calls import Calls, decoded
from app.client.wire import Job


class GenerationJobs:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def verify(self, tenant: str, database: str, *, generation: int | None = None) -> Job:
        """Reads all bytes of a generation's blobs again; the newest one's by default."""
        return await self._ask("/admin/verifications", tenant, database, generation)

    async def download(self, tenant: str, database: str, *, generation: int | None = None) -> Job:
        """Brings a generation's blobs into the service's hot cache."""
        return await self._ask("/admin/downloads", tenant, database, generation)

    async def _ask(self, path: str, tenant: str, database: str, generation: int | None) -> Job:
        asked: dict[str, object] = {"tenant": tenant, "database": database}
        if generation is not None:
            asked["generation"] = generation
        response = await self._calls.send("POST", path, json=asked, key=self._calls.new_key())
        return decoded(response, Job)
