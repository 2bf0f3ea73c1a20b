"""The standard workload on the whole service, with a note of each try and each answer.

Arguments: the protection to take away, and the compression of the blobs.
"""

import asyncio
import sys

import httpx

from tests.fault.children.notes import ROOT, note
from tests.fault.children.protections import take_away
from tests.fault.children.service_in_process import service
from tests.helpers.ledger import Append
from tests.helpers.workload import Workload

LARGE_COUNT = 8  # the WAL's own power-cut test has the append over several segments


class NotedWorkload(Workload):
    async def create(self, client: httpx.AsyncClient) -> None:
        await super().create(client)
        note(created=True)

    async def _send(self, client: httpx.AsyncClient, append: Append) -> None:
        note(trying=len(append.payloads), pad_bytes=append.pad_bytes)
        await super()._send(client, append)
        note(acknowledged=append.ordinal, first_lsn=append.first_lsn, last_lsn=append.last_lsn)

    async def trigger(self, client: httpx.AsyncClient) -> str:
        job_id = await super().trigger(client)
        note(job=job_id, covered=self.jobs[job_id])
        return job_id

    async def wait_job(self, client: httpx.AsyncClient, job_id: str) -> None:
        await super().wait_job(client, job_id)
        note(completed=job_id)


async def main() -> None:
    async with service(ROOT / "data") as client:
        await NotedWorkload(compression=sys.argv[2], large_count=LARGE_COUNT).run(client)


take_away(sys.argv[1])
asyncio.run(main())
