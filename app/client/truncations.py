"""Truncations: ask for one; look at them and wait for them as for any job."""

from typing import Literal

from app.client.calls import decoded
from app.client.jobs import Jobs
from app.client.wire import Job

Direction = Literal["head", "tail"]
OnLease = Literal["wait", "cancel"]


class Truncations(Jobs):
    """Jobs that truncate, under `/truncations`; they are cancelled under `/jobs`."""

    root = "/truncations"
    cancel_root = "/jobs"

    async def request(
        self,
        tenant: str,
        database: str,
        *,
        direction: Direction,
        lsn: int,
        on_lease: OnLease | None = None,
        lease_timeout_seconds: float | None = None,
    ) -> Job:
        """head: chunks that end below `lsn` go; tail: `lsn` and all after it that is there now."""
        asked = {
            "tenant": tenant,
            "database": database,
            "direction": direction,
            "lsn": lsn,
            "on_lease": on_lease,
            "lease_timeout_seconds": lease_timeout_seconds,
        }
        response = await self._calls.send(
            "POST",
            self.root,
            json={name: value for name, value in asked.items() if value is not None},
            key=self._calls.new_key(),
        )
        return decoded(response, Job)
