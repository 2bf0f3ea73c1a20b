"""Collection on demand, and why a blob is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from app.core.reads.read_point import GenerationPins
from app.core.stores.manifest.lineage import is_valid_at
from app.core.stores.manifest.records import ChunkDeltaRecord, ChunkRecord, DatabaseRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.tables import BlobReference, NameKind
from app.core.stores.manifest.view import ManifestView
from app.core.stores.remote.keys import (
    OWNER_KEY,
    GenerationDocumentKey,
    SnapshotMetaKey,
    TenantKey,
    parse_key,
)
from app.core.workers.collector import Collector, RoundReport, RoundRequest

Sees = Callable[[str], bool]
"""Whether the caller may see a tenant's things."""
BlobState = Literal["kept", "retired", "doomed", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobReason:
    """One thing that keeps a blob. `kind` says what, `fields` which."""

    kind: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobExplanation:
    key: str
    state: BlobState
    reasons: tuple[BlobReason, ...]
    eligible_at_us: int | None = None
    """Retired or doomed: when the next step may be taken."""


class Collection:
    def __init__(self, manifest: ManifestStore, collector: Collector, pins: GenerationPins) -> None:
        self._manifest = manifest
        self._collector = collector
        self._pins = pins

    async def run(self, request: RoundRequest) -> RoundReport:
        """Retention now, and everything that is due. Raises RemoteUnavailable, NotReady."""
        return await self._collector.ask(request)

    async def explain(self, key: str, *, sees: Sees) -> BlobExplanation:
        """Why a key is kept, is going, or that it is not known: also where the caller may not see
        the tenant that it belongs to (I12).
        """
        parsed = parse_key(key)
        if isinstance(parsed, TenantKey) and not sees(parsed.tenant):
            return BlobExplanation(key=key, state="unknown", reasons=())
        return await self._manifest.read_in_thread(lambda view: self._explain(view, key, sees))

    def _explain(self, view: ManifestView, key: str, sees: Sees) -> BlobExplanation:
        reasons = [
            reason
            for reference in view.blob_references(key)
            for reason in self._row_reasons(view, reference, sees)
        ]
        reasons += _job_reasons(view, key)
        reasons += _document_reasons(view, key)
        if reasons:
            return BlobExplanation(key=key, state="kept", reasons=tuple(reasons))
        row = view.gc_row(key)
        if row is None:
            return BlobExplanation(key=key, state="unknown", reasons=())
        return BlobExplanation(
            key=key,
            state="doomed" if row.doomed else "retired",
            reasons=(BlobReason(kind="queued", fields={"reason": row.reason}),),
            eligible_at_us=row.eligible_at_us,
        )

    def _row_reasons(
        self, view: ManifestView, reference: BlobReference, sees: Sees
    ) -> list[BlobReason]:
        database = view.database(reference.db_id)
        row = _row(view, reference)
        if database is None or row is None or not sees(database.tenant):
            return []
        where = {
            "tenant": database.tenant,
            "database": database.name,
            "chunk_id": reference.chunk_id,
            "generation": reference.generation,
            "superseded_at": row.superseded_at,
        }
        reasons = [BlobReason(kind=_ROW_KINDS[reference.kind], fields=where)]
        if row.superseded_at is None and database.state != "tombstoned":
            reasons.append(BlobReason(kind="newest_generation", fields=_named(database)))
        retained = [
            number
            for number in view.generation_numbers(database.db_id)
            if is_valid_at(row, number) and number != database.generation
        ]
        if retained:
            fields = {**_named(database), "generations": retained[:100], "count": len(retained)}
            reasons.append(BlobReason(kind="retained_generations", fields=fields))
        reasons += [
            BlobReason(kind="snapshot", fields={**_named(database), "snapshot": snapshot.name})
            for snapshot in view.snapshots(database.db_id)
            if is_valid_at(row, snapshot.generation)
        ]
        reasons += [
            BlobReason(kind="fork", fields={"tenant": fork.tenant, "database": fork.database})
            for fork in view.inheriting_forks(row)
            if sees(fork.tenant)
        ]
        reading = [
            number
            for number in sorted(self._pins.generations(database.db_id))
            if is_valid_at(row, number)
        ]
        if reading:
            fields = {**_named(database), "generations": reading}
            reasons.append(BlobReason(kind="reader", fields=fields))
        return reasons


_ROW_KINDS: dict[NameKind, str] = {
    "chunk": "chunk_row",
    "delta": "delta_row",
    "base": "base_of_delta",
}


def _row(view: ManifestView, reference: BlobReference) -> ChunkRecord | ChunkDeltaRecord | None:
    rows: list[ChunkRecord | ChunkDeltaRecord] = []
    if reference.kind == "chunk":
        rows += view.chunk_rows_of(reference.db_id, reference.chunk_id)
    else:
        rows += view.delta_rows_of(reference.db_id, reference.chunk_id)
    return next((row for row in rows if row.generation == reference.generation), None)


def _named(database: DatabaseRecord) -> dict[str, Any]:
    return {"tenant": database.tenant, "database": database.name}


def _job_reasons(view: ManifestView, key: str) -> list[BlobReason]:
    return [
        BlobReason(kind="job", fields={"job_id": job.job_id, "state": job.state})
        for job in view.unfinished_jobs()
        if any(
            row is not None and row.blob is not None and row.blob.key == key
            for intent in job.intents
            for row in (intent.row, intent.delta)
        )
    ]


def _document_reasons(view: ManifestView, key: str) -> list[BlobReason]:
    if key == OWNER_KEY:
        return [BlobReason(kind="owner", fields={})]
    match parse_key(key):
        case GenerationDocumentKey() as document:
            row = view.generation(document.db_id, document.generation)
            if row is not None and row.document_key == key:
                fields = {
                    "tenant": document.tenant,
                    "database": document.database,
                    "generation": document.generation,
                }
                return [BlobReason(kind="generation_document", fields=fields)]
        case SnapshotMetaKey() as meta:
            if any(
                row.document is not None and row.document.key == key for row in view.all_snapshots()
            ):
                fields = {"tenant": meta.tenant, "database": meta.database, "snapshot": meta.name}
                return [BlobReason(kind="snapshot_document", fields=fields)]
        case _:
            pass
    return []
