"""What health and debug answers look like."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from app.core.base.clock import rfc3339
from app.core.coordination.quota_levels import QuotaSnapshot
from app.core.reads.page_cache import PageCacheStats
from app.core.services.debugging import CacheReport, NamedLease
from app.core.services.fsck import FsckReport
from app.core.stores.local.hot_cache import HotCacheStats
from app.core.stores.manifest.ops import decode_op
from app.core.stores.manifest.records import ChangeRecord
from app.routers.schemas import EXAMPLE_JOB_ID, EXAMPLE_TIME, PageOf, View, example, plain


class AliveView(View):
    model_config = ConfigDict(json_schema_extra=example({"status": "alive"}))

    status: Literal["alive"]


class ReadinessView(View):
    model_config = ConfigDict(
        json_schema_extra=example({"status": "ready", "reasons": [], "degraded": []})
    )

    status: Literal["ready", "starting", "stopping", "failed"]
    reasons: list[str]
    degraded: list[str]


class LeaseView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "tenant": "acme",
                "database": "events",
                "chunk_id": 0,
                "generation": 2,
                "job_id": EXAMPLE_JOB_ID,
                "token": 17,
                "registered_at": EXAMPLE_TIME,
                "expires_at": EXAMPLE_TIME,
            }
        )
    )

    tenant: str
    database: str
    chunk_id: int
    generation: int
    job_id: str
    token: int
    registered_at: str
    expires_at: str

    @classmethod
    def of(cls, named: NamedLease) -> Self:
        lease = named.lease
        return cls(
            tenant=named.tenant,
            database=named.database,
            chunk_id=lease.chunk_id,
            generation=lease.generation,
            job_id=lease.job_id,
            token=lease.token,
            registered_at=rfc3339(lease.registered_at_us),
            expires_at=rfc3339(lease.expires_at_us),
        )


class ChangeView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "sequence": 7,
                "committed_at": EXAMPLE_TIME,
                "tenant": "acme",
                "database": "events",
                "generation": 1,
                "reason": "checkpoint.published",
                "ops": [{"type": "AdvanceCheckpointed", "db_id": 1, "generation": 1, "lsn": 1000}],
            }
        )
    )

    sequence: int
    committed_at: str
    tenant: str
    database: str
    generation: int
    reason: str
    ops: list[dict[str, Any]]
    """Each with its `type`; bytes are shown in hexadecimal."""

    @classmethod
    def of(cls, change: ChangeRecord) -> Self:
        return cls(
            sequence=change.sequence,
            committed_at=rfc3339(change.committed_at_us),
            tenant=change.tenant,
            database=change.database,
            generation=change.generation,
            reason=change.reason,
            ops=[{"type": type(op).__name__, **plain(op)} for op in map(decode_op, change.ops)],
        )


class ManifestStatsView(BaseModel):
    """Counts and sizes of the manifest; its members may grow."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra=example({"map_bytes": 68_719_476_736, "used_bytes": 1_048_576}),
    )


class GlobalQuotaView(View):
    limit_bytes: int
    used_bytes: int


class TenantQuotaView(View):
    tenant: str
    limit_bytes: int | None
    used_bytes: int


class JobQuotaView(View):
    job_id: str
    tenant: str
    reserved_bytes: int


class QuotaView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "global": {"limit_bytes": 68_719_476_736, "used_bytes": 67_108_864},
                "tenants": [{"tenant": "acme", "limit_bytes": None, "used_bytes": 67_108_864}],
                "jobs": [
                    {"job_id": EXAMPLE_JOB_ID, "tenant": "acme", "reserved_bytes": 67_108_864}
                ],
            }
        ),
        populate_by_name=True,
    )

    global_: GlobalQuotaView = Field(alias="global")
    tenants: list[TenantQuotaView]
    jobs: list[JobQuotaView]

    @classmethod
    def of(cls, quota: QuotaSnapshot) -> Self:
        return cls(
            global_=GlobalQuotaView(
                limit_bytes=quota.global_limit_bytes, used_bytes=quota.global_used_bytes
            ),
            tenants=[
                TenantQuotaView(
                    tenant=one.tenant, limit_bytes=one.limit_bytes, used_bytes=one.used_bytes
                )
                for one in quota.tenants
            ],
            jobs=[
                JobQuotaView(
                    job_id=one.job_id, tenant=one.tenant, reserved_bytes=one.reserved_bytes
                )
                for one in quota.jobs
            ],
        )


class OneCacheView(View):
    limit_bytes: int
    used_bytes: int
    entries: int
    hits: int
    misses: int

    @classmethod
    def of(cls, stats: PageCacheStats | HotCacheStats) -> Self:
        return cls(
            limit_bytes=stats.limit_bytes,
            used_bytes=stats.used_bytes,
            entries=stats.entries,
            hits=stats.hits,
            misses=stats.misses,
        )


class CacheView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "page_cache": {
                    "limit_bytes": 67_108_864,
                    "used_bytes": 1_114_112,
                    "entries": 256,
                    "hits": 90_210,
                    "misses": 16,
                },
                "hot_cache": {
                    "limit_bytes": 4_294_967_296,
                    "used_bytes": 268_435_456,
                    "entries": 4,
                    "hits": 32,
                    "misses": 0,
                },
            }
        )
    )

    page_cache: OneCacheView
    hot_cache: OneCacheView

    @classmethod
    def of(cls, report: CacheReport) -> Self:
        return cls(
            page_cache=OneCacheView.of(report.page_cache),
            hot_cache=OneCacheView.of(report.hot_cache),
        )


class FindingView(View):
    invariant: str
    where: str
    detail: str


class FsckView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "findings": [
                    {
                        "invariant": "I2",
                        "where": "checkpoints/acme/events/…/chunk-0-1-….blob",
                        "detail": "the blob is not on the remote store",
                    }
                ],
                "checked": {"databases": 1, "chunks": 4, "blobs": 4, "changes": 19},
            }
        )
    )

    findings: list[FindingView]
    checked: dict[str, int]

    @classmethod
    def of(cls, report: FsckReport) -> Self:
        return cls(
            findings=[
                FindingView(invariant=one.invariant, where=one.where, detail=one.detail)
                for one in report.findings
            ],
            checked=report.checked,
        )


class LeasePage(PageOf):
    items: list[LeaseView]


class ChangePage(PageOf):
    items: list[ChangeView]
