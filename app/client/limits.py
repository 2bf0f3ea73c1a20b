"""Storage limits and feature flags."""

from collections.abc import Mapping

import msgspec

from app.client.calls import Calls, decoded, path_of
from app.client.wire import Answer


class Flags(Answer, frozen=True):
    enable_checkpoints: bool
    enable_chunk_deltas: bool
    enable_append_only_truncation: bool
    enable_cold_scan: bool
    checkpoint_interval_seconds: int


class GlobalLimit(Answer, frozen=True):
    global_bytes: int


class TenantLimits(Answer, frozen=True):
    """None: no limit at that level."""

    tenant: str
    limit_bytes: int | None
    job_limit_bytes: int | None


class GlobalUse(Answer, frozen=True):
    limit_bytes: int
    used_bytes: int


class TenantUse(Answer, frozen=True):
    tenant: str
    limit_bytes: int | None
    used_bytes: int


class JobUse(Answer, frozen=True):
    job_id: str
    tenant: str
    reserved_bytes: int


class QuotaUse(Answer, frozen=True):
    everything: GlobalUse = msgspec.field(name="global")
    tenants: list[TenantUse]
    jobs: list[JobUse]


class Limits:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def quota(self) -> QuotaUse:
        return await self._calls.get("/debug/storage/quota", QuotaUse)

    async def set_global(self, global_bytes: int | None) -> GlobalLimit:
        """None: what the service's settings say."""
        body = {"global_bytes": global_bytes}
        response = await self._calls.send("PUT", "/admin/quota", json=body)
        return decoded(response, GlobalLimit)

    async def tenant(self, tenant: str) -> TenantLimits:
        return await self._calls.get(path_of("admin", "tenants", tenant, "quota"), TenantLimits)

    async def set_tenant(
        self, tenant: str, *, limit_bytes: int | None, job_limit_bytes: int | None
    ) -> TenantLimits:
        """Replaces both."""
        response = await self._calls.send(
            "PUT",
            path_of("admin", "tenants", tenant, "quota"),
            json={"limit_bytes": limit_bytes, "job_limit_bytes": job_limit_bytes},
        )
        return decoded(response, TenantLimits)

    async def flags(self, tenant: str) -> Flags:
        return await self._calls.get(path_of("admin", "tenants", tenant, "feature-flags"), Flags)

    async def set_flags(self, tenant: str, changes: Mapping[str, bool | int | None]) -> Flags:
        """Only the flags that are named; an interval of None is the service's default."""
        response = await self._calls.send(
            "PATCH", path_of("admin", "tenants", tenant, "feature-flags"), json=changes
        )
        return decoded(response, Flags)
