"""What the JSON of collection and of deletion looks like."""

from typing import Any, Literal, Self

from pydantic import ConfigDict

from app.core.base.clock import rfc3339
from app.core.retention.orphans import OrphanReport
from app.core.services.collection import BlobExplanation
from app.core.workers.collector import RoundReport
from app.routers.schemas import EXAMPLE_JOB_ID, EXAMPLE_TIME, Body, View, example

ORPHANS_SHOWN = 1000
EXAMPLE_KEY = (
    f"checkpoints/acme/events/0000000001-000001-{EXAMPLE_JOB_ID}/chunk-0-1-{'0' * 64}.blob"
)


class RunCollectionBody(Body):
    model_config = ConfigDict(json_schema_extra=example({"orphans": "report"}))

    orphans: Literal["report", "delete"] | None = None
    """Also lists the prefix and tells, or deletes, what nobody knows."""
    accept_clock: bool = False
    """The wall clock is right, although it jumped: go on collecting by it."""


class OrphanView(View):
    key: str
    bytes: int
    modified_at: str


class OrphansView(View):
    listed: int
    count: int
    bytes: int
    queued: int
    """For deletion."""
    items: list[OrphanView]
    """The first 1,000."""
    foreign: list[str]
    """Keys that this service cannot have made; they are never touched."""

    @classmethod
    def of(cls, report: OrphanReport) -> Self:
        return cls(
            listed=report.listed,
            count=len(report.orphans),
            bytes=report.bytes,
            queued=report.queued,
            items=[
                OrphanView(key=info.key, bytes=info.bytes, modified_at=rfc3339(info.modified_at_us))
                for info in report.orphans[:ORPHANS_SHOWN]
            ],
            foreign=report.foreign[:ORPHANS_SHOWN],
        )


class CollectionView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "collection_time": EXAMPLE_TIME,
                "paused": False,
                "expired_generations": 3,
                "removed_rows": 5,
                "retired_blobs": 5,
                "retired_bytes": 41_234,
                "doomed_blobs": 0,
                "deleted_blobs": 5,
                "deleted_bytes": 41_234,
                "failed_blobs": 0,
                "waiting_blobs": 0,
                "orphans": None,
            }
        )
    )

    collection_time: str
    paused: bool
    """After a jump of the wall clock: nothing is collected until `accept_clock`."""
    expired_generations: int
    removed_rows: int
    retired_blobs: int
    """Objects that lost their last row now, documents of generations included."""
    retired_bytes: int
    doomed_blobs: int
    """Queued before, proven unreachable now."""
    deleted_blobs: int
    deleted_bytes: int
    failed_blobs: int
    """Not deleted for now; tried again."""
    waiting_blobs: int
    """For the grace period or for another try."""
    orphans: OrphansView | None

    @classmethod
    def of(cls, report: RoundReport) -> Self:
        removed, collected = report.removed, report.collected
        return cls(
            collection_time=rfc3339(report.time.now_us),
            paused=report.time.paused,
            expired_generations=removed.generations,
            removed_rows=removed.rows,
            retired_blobs=removed.retired_blobs,
            retired_bytes=removed.retired_bytes,
            doomed_blobs=collected.doomed,
            deleted_blobs=collected.deleted,
            deleted_bytes=collected.deleted_bytes,
            failed_blobs=collected.failed,
            waiting_blobs=report.waiting,
            orphans=None if report.orphans is None else OrphansView.of(report.orphans),
        )


class BlobExplanationView(View):
    model_config = ConfigDict(
        json_schema_extra=example(
            {
                "key": EXAMPLE_KEY,
                "state": "kept",
                "eligible_at": None,
                "reasons": [
                    {
                        "kind": "snapshot",
                        "tenant": "acme",
                        "database": "events",
                        "snapshot": "before-upgrade",
                    }
                ],
            }
        )
    )

    key: str
    state: Literal["kept", "retired", "doomed", "unknown"]
    eligible_at: str | None
    """Retired or doomed: when the next step may be taken."""
    reasons: list[dict[str, Any]]
    """Each with its `kind`: what names the blob, and what keeps that."""

    @classmethod
    def of(cls, explanation: BlobExplanation) -> Self:
        at = explanation.eligible_at_us
        return cls(
            key=explanation.key,
            state=explanation.state,
            eligible_at=None if at is None else rfc3339(at),
            reasons=[{"kind": reason.kind, **reason.fields} for reason in explanation.reasons],
        )
