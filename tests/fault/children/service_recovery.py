"""Starts the service on what a power cut left of its disk, and tells all that it then holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from app.container import fsck
from tests.fault.children.service_in_process import service, settings_for
from tests.helpers.ledger import FinalRecord
from tests.helpers.wait import wait_until
from tests.helpers.workload import DATABASE, Workload, scratch_left


@dataclass(slots=True, kw_only=True)
class Recovered:
    database: dict[str, Any] | None = None
    records: list[FinalRecord] = field(default_factory=list)
    job_states: dict[str, str] = field(default_factory=dict)
    leases: int = 0
    scratch: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


async def recover(directory: Path, notes: Sequence[dict[str, Any]]) -> Recovered:
    del notes  # what is there does not depend on them
    data_dir, found = directory / "data", Recovered()
    async with service(data_dir) as client:
        await wait_until(lambda: _is_idle(client), timeout=20, describe="idle jobs")
        database = await client.get(DATABASE)
        if database.status_code == 200:
            found.database = database.json()
            found.records = await Workload().read_all(client)
        jobs = (await client.get("/checkpoints")).json()["items"]
        found.job_states = {job["id"]: job["state"] for job in jobs}
        found.leases = len((await client.get("/debug/checkpoint/leases")).json()["items"])
        found.scratch = scratch_left(data_dir)
    report = await fsck(settings_for(data_dir))
    found.findings = [str(finding) for finding in report.findings]
    return found


async def _is_idle(client: httpx.AsyncClient) -> bool:
    answer = await client.get("/debug/checkpoint/active_jobs")
    return answer.json()["items"] == []
