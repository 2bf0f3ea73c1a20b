"""What an operator sets for all tenants or for one: feature flags and storage limits.

Invariants: a change is durable on return and holds at once, for new work; it survives a restart.
Concurrency: a tenant's row is read, changed and written whole, by one at a time.
Cancellation: the change was made or was not. Crash: the same.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from app.core.base.events import Events
from app.core.coordination.limits import global_limit_of, global_limit_op
from app.core.coordination.quota import StorageQuota
from app.core.stores.manifest.ops import ManifestBatch, PutTenant
from app.core.stores.manifest.records import FeatureFlags, TenantRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantLimits:
    """None: no limit at that level."""

    limit_bytes: int | None
    job_limit_bytes: int | None


class Tenants:
    def __init__(
        self,
        manifest: ManifestStore,
        quota: StorageQuota,
        *,
        events: Events,
        interval_seconds: int,
        global_limit_bytes: int,
        on_flags: Callable[[str], None],
    ) -> None:
        """The defaults are the settings'; `on_flags` is told whose flags have changed."""
        self._manifest = manifest
        self._quota = quota
        self._events = events
        self._interval_seconds = interval_seconds
        self._global_limit_bytes = global_limit_bytes
        self._on_flags = on_flags
        self._turn = asyncio.Lock()

    def flags(self, tenant: str) -> FeatureFlags:
        """With the interval that holds."""
        with self._manifest.read() as view:
            flags = _row_of(view, tenant).flags
        if flags.checkpoint_interval_seconds is None:
            return msgspec.structs.replace(
                flags, checkpoint_interval_seconds=self._interval_seconds
            )
        return flags

    async def set_flags(
        self, tenant: str, changes: Mapping[str, bool | int | None]
    ) -> FeatureFlags:
        """`changes` are fields of FeatureFlags; an interval of None is the default."""
        async with self._turn:
            with self._manifest.read() as view:
                row = _row_of(view, tenant)
            flags = msgspec.structs.replace(row.flags, **changes)
            await self._put(msgspec.structs.replace(row, flags=flags), reason="tenant.flags_set")
        self._events.info("tenant.flags_set", tenant=tenant, **changes)
        self._on_flags(tenant)
        return self.flags(tenant)

    def limits(self, tenant: str) -> TenantLimits:
        with self._manifest.read() as view:
            row = _row_of(view, tenant)
        return TenantLimits(limit_bytes=row.limit_bytes, job_limit_bytes=row.job_limit_bytes)

    async def set_limits(self, tenant: str, limits: TenantLimits) -> TenantLimits:
        """A limit below what is used is taken; reservations are refused until use has fallen."""
        async with self._turn:
            with self._manifest.read() as view:
                row = _row_of(view, tenant)
            changed = msgspec.structs.replace(
                row, limit_bytes=limits.limit_bytes, job_limit_bytes=limits.job_limit_bytes
            )
            await self._put(changed, reason="tenant.limits_set")
            self._quota.set_tenant_limits(
                tenant, limit_bytes=limits.limit_bytes, job_limit_bytes=limits.job_limit_bytes
            )
        self._events.info(
            "tenant.limits_set", tenant=tenant, limit_bytes=limits.limit_bytes,
            job_limit_bytes=limits.job_limit_bytes,
        )  # fmt: skip
        return limits

    def global_limit_bytes(self) -> int:
        with self._manifest.read() as view:
            known = global_limit_of(view)
        return self._global_limit_bytes if known is None else known

    async def set_global_limit(self, limit_bytes: int | None) -> int:
        """None: what the settings say. Of what is above the limit only cache is dropped."""
        async with self._turn:
            await self._manifest.commit(
                ManifestBatch(ops=(global_limit_op(limit_bytes),), reason="quota.limit_set")
            )
            held = self._global_limit_bytes if limit_bytes is None else limit_bytes
            self._quota.set_global_limit(held)
        self._events.info("quota.limit_set", global_bytes=held)
        await self._quota.trim()
        return held

    async def _put(self, row: TenantRecord, *, reason: str) -> None:
        await self._manifest.commit(ManifestBatch(ops=(PutTenant(row=row),), reason=reason))


def _row_of(view: ManifestView, tenant: str) -> TenantRecord:
    return view.tenant(tenant) or TenantRecord(tenant=tenant)
