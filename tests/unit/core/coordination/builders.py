"""Quotas, and what is used of them."""

from collections.abc import Coroutine
from typing import Any, TypeVar

from app.core.base.events import Events
from app.core.coordination.quota import StorageQuota
from app.core.coordination.usage import UsageKind, UsageLink
from tests.helpers.fake_clock import FakeClock

T = TypeVar("T")


def make_quota(limit: int = 1000, *, drain: int = 0, clock: FakeClock | None = None):
    return StorageQuota(
        global_limit_bytes=limit,
        drain_limit_bytes=drain,
        clock=clock or FakeClock(),
        events=Events(),
    )


def used(quota: StorageQuota) -> dict[str, object]:
    seen = quota.snapshot()
    return {
        "global": seen.global_used_bytes,
        "drain": seen.drain_used_bytes,
        "tenants": {tenant.tenant: tenant.used_bytes for tenant in seen.tenants},
        "jobs": {job.job_id: job.reserved_bytes for job in seen.jobs},
    }


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine gives that waits for nothing, as `reserve` does without reclaimers."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("It waits.")


EMPTY = {"global": 0, "drain": 0, "tenants": {}, "jobs": {}}


def link(kind: UsageKind, owner: str, name: str, tenant: str | None) -> UsageLink:
    return UsageLink(kind=kind, owner=owner, name=name, tenant=tenant)
