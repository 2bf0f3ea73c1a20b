"""Reads of published generations beside everything else: cold scans, downloads, verifications, and
verifications of an object that has rotted in the bucket.
"""

import asyncio

from app.container.service import Container
from app.core.formats.cold_scan import FrameType
from app.core.jobs.generation_jobs import GenerationJobKind
from app.core.services.states import Newest
from app.core.stores.manifest.records import JobRecord
from tests.simulation.bucket import Violation
from tests.simulation.content import Content, Database, Picture, unpacked
from tests.simulation.crowd import Crowd


class Auditor:
    def __init__(self, crowd: Crowd, container: Container) -> None:
        self._crowd = crowd
        self._source = crowd.source
        self._services = container.services

    async def scan(self, database: Database) -> None:
        """All of a generation, by a reader who takes his time."""
        scan = await self._services.cold_scans.open(database.tenant, database.name, Newest())
        records: dict[int, bytes] = {}
        pages: list[bytes] = []
        ended = False
        dawdles = self._source.random() < 0.5
        try:
            async for frame in scan.frames():
                ended = frame.type is FrameType.END
                if frame.is_data:
                    payload = bytes(frame.payload)
                    if isinstance(database, Picture):
                        pages.append(payload)
                    else:
                        records.update(enumerate(unpacked(payload), frame.first))
                if dawdles:
                    await asyncio.sleep(self._source.expovariate(1 / 1500.0))
        finally:
            await scan.aclose()
        if self._crowd.is_dead():
            return
        if not ended:
            raise Violation(f"a scan of {database.name} ended without saying so")
        found: Content = b"".join(pages) if isinstance(database, Picture) else records
        database.check_past(found)

    async def verify(self, database: Database) -> None:
        rots, rotten = self._crowd.bucket.rots, bool(self._crowd.bucket.rotten)
        job = await self._request("verify_manifest", database)
        told = job.result or {}
        is_ill = told.get("repaired_blobs") or told.get("damaged_blobs")
        if is_ill and rots == self._crowd.bucket.rots and not rotten:
            raise Violation(f"{database.name} is well, and was found otherwise: {told}")

    async def download(self, database: Database) -> None:
        await self._request("download_checkpoint", database)

    async def rot(self, database: Database) -> None:
        """A bit of an object flips where it lies. The verification that comes tells, and mends it
        where the cache has it; then somebody puts the right bytes back.
        """
        crowd = self._crowd
        assert crowd.life is not None
        keys = crowd.life.blob_keys(database.tenant, database.name)
        if not keys or crowd.bucket.rotten:
            return
        key = self._source.choice(keys)
        crowd.bucket.rot(key)
        try:
            job = await self._request("verify_manifest", database)
            told = job.result or {}
            is_over = job.state in {"completed", "failed"} and not crowd.is_dead()
            still_named = key in crowd.life.blob_keys(database.tenant, database.name)
            if is_over and still_named and key in crowd.bucket.rotten:
                crowd.done["rot told"] += 1
                if job.state == "completed":
                    raise Violation(f"{key} has rotted, and {database.name} is verified: {told}")
            elif is_over and key not in crowd.bucket.rotten:
                crowd.done["rot mended"] += 1
        finally:
            crowd.bucket.heal(key)
        await self._request("verify_manifest", database)

    async def _request(self, kind: GenerationJobKind, database: Database) -> JobRecord:
        job = await self._services.generation_jobs.request(
            kind, database.tenant, database.name, generation=None, principal="auditor"
        )
        return await self._services.jobs.wait(job.job_id, seconds=6 * 3600.0)
