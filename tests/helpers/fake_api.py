"""The contract of api.md in memory, behind an httpx transport: for clients, without a network.

It stores records, makes checkpoints at once or in steps, and fails as told: see `refuse`,
`break_connection`, `break_stream`. It remembers every request.
"""

import json
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

TIME = "2026-11-23T21:05:00.000000Z"
PIECE_BYTES = 7  # so that no record arrives whole
RECORDS = "application/vnd.bop.records"
LINES = "application/x-ndjson"

Handler = Callable[[httpx.Request], httpx.Response]


@dataclass
class FakeDatabase:
    members: dict[str, Any]
    records: dict[int, bytes] = field(default_factory=dict)
    remembered: dict[str, dict[str, Any]] = field(default_factory=dict)


class FakeApi:
    def __init__(self, *, token: str | None = None) -> None:
        self.token = token
        self.databases: dict[tuple[str, str], FakeDatabase] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.job_steps: dict[str, list[dict[str, Any]]] = {}
        self.changes: list[dict[str, Any]] = []
        self.leases: list[dict[str, Any]] = []
        self.canned: dict[tuple[str, str], tuple[int, Any]] = {}
        """Method and path to status and JSON: answers that need no memory."""
        self.generations: list[dict[str, Any]] = []
        self.snapshots: list[dict[str, Any]] = []
        self.findings: list[dict[str, str]] = []
        self.reasons: list[str] = []
        self.requests: list[httpx.Request] = []
        self.page_items = 1000
        self.broken_stream_after: list[int] = []
        self.events_broken = False
        self._before: list[Handler] = []
        self._after: list[Handler] = []

    def transport(self) -> httpx.AsyncBaseTransport:
        return httpx.MockTransport(self.handle)

    # --- failures ------------------------------------------------------------------------------

    def refuse(self, status: int, code: str, *, retry_after: str | None = None) -> None:
        """The next request is answered with a problem; nothing of it is kept."""
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        self._before.append(lambda request: problem(status, code, headers=headers))

    def break_connection(self, *, after_effect: bool = False) -> None:
        """The next request gets no answer, before or after it took effect."""

        def broken(request: httpx.Request) -> httpx.Response:
            raise httpx.ReadError("the peer reset the connection", request=request)

        (self._after if after_effect else self._before).append(broken)

    def break_stream(self, *, after_bytes: int) -> None:
        """The next stream of records ends in its middle."""
        self.broken_stream_after.append(after_bytes)

    # --- state ---------------------------------------------------------------------------------

    def add_database(self, tenant: str, name: str, **members: Any) -> FakeDatabase:
        database = FakeDatabase(
            {
                "tenant": tenant,
                "database": name,
                "db_id": len(self.databases) + 1,
                "engine": "append_only",
                "page_size": None,
                "chunk_bytes": 64 << 20,
                "compression": "none",
                "state": "active",
                "generation": 0,
                "first_lsn": 1,
                "next_lsn": 1,
                "checkpointed_lsn": 0,
                "page_count": 0,
                "wal_bytes": 0,
                "created_at": TIME,
                "forked_from": None,
                "health": {"state": "ok", "lost_from_lsn": None},
                "added_by_a_newer_service": True,
            }
            | members
        )
        self.databases[tenant, name] = database
        return database

    def add_records(self, tenant: str, name: str, *records: bytes, gap: int = 0) -> None:
        database = self.databases.get((tenant, name)) or self.add_database(tenant, name)
        database.members["next_lsn"] += gap
        for record in records:
            database.records[database.members["next_lsn"]] = record
            database.members["next_lsn"] += 1

    def add_job(self, *states: str, kind: str = "create_checkpoint") -> str:
        """A job that goes one state on each time it is looked at."""
        job_id = f"01JOB{len(self.jobs):021d}"
        steps = [job_members(job_id, kind, state, step) for step, state in enumerate(states)]
        self.jobs[job_id], self.job_steps[job_id] = steps[0], steps[1:]
        return job_id

    # --- requests ------------------------------------------------------------------------------

    async def handle(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.requests.append(request)
        if self._before:
            return self._before.pop(0)(request)
        response = self._answer(request)
        if self._after:
            return self._after.pop(0)(request)
        return response

    def _answer(self, request: httpx.Request) -> httpx.Response:  # noqa: C901 - a table of routes
        path = request.url.path
        if path == "/readyz":
            status = "starting" if self.reasons else "ready"
            body = {"status": status, "reasons": self.reasons, "degraded": []}
            return httpx.Response(503 if self.reasons else 200, json=body)
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return problem(401, "unauthenticated")
        if (known := self.canned.get((request.method, path))) is not None:
            return httpx.Response(known[0], json=known[1])
        match request.method, path.strip("/").split("/"):
            case "GET", ["tenants", tenant, "databases"]:
                found = [
                    one.members for (owner, _), one in self.databases.items() if owner == tenant
                ]
                return self._page(request, found)
            case "PUT", ["tenants", tenant, "databases", name]:
                return self._create(request, tenant, name)
            case method, ["tenants", tenant, "databases", name, *rest]:
                database = self.databases.get((tenant, name))
                if database is None:
                    return problem(
                        404, "database_not_found", detail=f"There is no {tenant}/{name}."
                    )
                return self._of_database(request, method, database, rest)
            case "POST", ["checkpoints"]:
                return self._checkpoint(request)
            case "GET", ["checkpoints", job_id, "events"]:
                return self._events(job_id)
            case "GET", ["checkpoints" | "jobs"]:
                return self._page(request, list(self.jobs.values()))
            case "POST", ["truncations"]:
                return self._truncate(request)
            case "GET", ["checkpoints" | "truncations" | "jobs", job_id]:
                return self._job(job_id)
            case "POST", ["checkpoints" | "jobs", job_id, "cancel"]:
                if self.jobs[job_id]["finished_at"]:
                    return problem(409, "job_already_ended")
                return httpx.Response(202, json=self.jobs[job_id])
            case "GET", ["debug", "checkpoint", "leases"]:
                return self._page(request, self.leases)
            case "GET", ["debug", "manifest", "change_log"]:
                after = int(request.url.params["after"])
                return self._page(request, [one for one in self.changes if one["sequence"] > after])
            case "GET", ["debug", "manifest", "stats"]:
                return httpx.Response(200, json={"map_bytes": 1 << 36, "rows": {"databases": 1}})
            case "GET", ["debug", "manifest", "fsck"]:
                report = {"findings": self.findings, "checked": {"databases": len(self.databases)}}
                return httpx.Response(200, json=report)
        return problem(404, "not_found")

    def _create(self, request: httpx.Request, tenant: str, name: str) -> httpx.Response:
        asked = json.loads(request.content)
        existing = self.databases.get((tenant, name))
        if existing is None:
            return httpx.Response(201, json=self.add_database(tenant, name, **asked).members)
        if any(existing.members[field] != value for field, value in asked.items()):
            return problem(409, "database_conflict")
        return httpx.Response(200, json=existing.members)

    def _of_database(  # noqa: C901 - a table of routes
        self, request: httpx.Request, method: str, database: FakeDatabase, rest: list[str]
    ) -> httpx.Response:
        match method, rest:
            case "GET", []:
                return httpx.Response(200, json=database.members)
            case "PATCH", []:
                rules = {"keep_generations": None, "keep_seconds": 86_400, "minimum_generations": 2}
                rules |= database.members.get("retention", {})
                database.members["retention"] = rules | json.loads(request.content)["retention"]
                return httpx.Response(200, json=database.members)
            case "GET", ["generations"]:
                expiring = request.url.params.get("expiring") == "true"
                kept = self.generations
                return self._page(
                    request, [one for one in kept if one["superseded_at"] or not expiring]
                )
            case "GET", ["snapshots"]:
                return self._page(request, self.snapshots)
            case "POST", ["snapshots"]:
                made = {"generation": 3, "last_lsn": 90, "page_count": 0, "created_at": TIME}
                self.snapshots.append(made | json.loads(request.content))
                return httpx.Response(201, json=self.snapshots[-1])
            case "GET" | "DELETE", ["snapshots", name]:
                found = [one for one in self.snapshots if one["name"] == name]
                if not found:
                    return problem(404, "snapshot_not_found")
                if method == "GET":
                    return httpx.Response(200, json=found[0])
                self.snapshots.remove(found[0])
                return httpx.Response(204)
            case "POST", ["forks"]:
                asked = json.loads(request.content)
                tenant = asked.get("tenant", database.members["tenant"])
                parent = {name: database.members[name] for name in ("tenant", "database")}
                forked_from = parent | {"generation": asked.get("generation", 3)}
                made = self.add_database(tenant, asked["database"], forked_from=forked_from)
                return httpx.Response(201, json=made.members)
            case "GET", ["durable"]:
                durable = database.members["next_lsn"] - 1
                return httpx.Response(200, json={"durable_lsn": durable, "checkpointed_lsn": 0})
            case "POST", ["acknowledge-loss"]:
                database.members["health"] = {"state": "ok", "lost_from_lsn": None}
                return httpx.Response(200, json=database.members)
            case "POST", ["records"]:
                return self._append(request, database)
            case "GET", ["records"]:
                return self._read(request, database)
        return problem(404, "not_found")

    def _append(self, request: httpx.Request, database: FakeDatabase) -> httpx.Response:
        key = request.headers.get("Idempotency-Key")
        if key in database.remembered:
            return httpx.Response(201, json=database.remembered[key])
        next_lsn = database.members["next_lsn"]
        if request.headers.get("If-Match") not in {None, f'"{next_lsn}"'}:
            return problem(412, "lsn_mismatch", next_lsn=next_lsn)
        records = records_of(request.headers["Content-Type"], request.content)
        if not records:
            return problem(400, "malformed_records")
        for offset, record in enumerate(records):
            database.records[next_lsn + offset] = record
        database.members["next_lsn"] = next_lsn + len(records)
        answer = {
            "first_lsn": next_lsn,
            "last_lsn": next_lsn + len(records) - 1,
            "count": len(records),
            "bytes": sum(map(len, records)),
        }
        if key is not None:
            database.remembered[key] = answer
        return httpx.Response(201, json=answer)

    def _read(self, request: httpx.Request, database: FakeDatabase) -> httpx.Response:
        params, next_lsn = request.url.params, database.members["next_lsn"]
        assert request.headers["Accept"] == RECORDS
        at = int(params.get("from_lsn", database.members["first_lsn"]))
        if at < database.members["first_lsn"]:
            return problem(410, "lsn_truncated", first_lsn=database.members["first_lsn"])
        last = min(int(params.get("to_lsn", next_lsn - 1)), next_lsn - 1)
        left = int(params.get("limit", next_lsn))
        if at not in database.records:  # in a gap, or beyond the end
            following = min(
                (lsn for lsn in database.records if lsn > at), default=max(at, next_lsn)
            )
            return httpx.Response(200, headers={"Bop-Next-Lsn": str(following)})
        chosen = []
        while at <= last and at in database.records and len(chosen) < left:
            chosen.append(at)
            at += 1
        following = at
        if at < next_lsn and at not in database.records:
            following = min((lsn for lsn in database.records if lsn > at), default=next_lsn)
        body = b"".join(
            struct.pack("<I", len(database.records[lsn])) + database.records[lsn] for lsn in chosen
        )
        broken_after = self.broken_stream_after.pop(0) if self.broken_stream_after else None
        headers = {
            "Bop-First-Lsn": str(chosen[0]),
            "Bop-Last-Lsn": str(chosen[-1]),
            "Bop-Next-Lsn": str(following),
            "Content-Type": RECORDS,
        }
        return httpx.Response(200, headers=headers, content=streamed(body, broken_after))

    def _checkpoint(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        if (asked["tenant"], asked["database"]) not in self.databases:
            return problem(404, "database_not_found")
        for job in self.jobs.values():
            if job["state"] == "pending":
                return httpx.Response(202, json=job)
        return httpx.Response(
            202, json=self.jobs[self.add_job("pending", "in_flight", "completed")]
        )

    def _truncate(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        if (asked["tenant"], asked["database"]) not in self.databases:
            return problem(404, "database_not_found")
        job_id = self.add_job("pending", "completed", kind="truncate_append_only")
        self.job_steps[job_id][-1]["result"] = {
            "outcome": "truncated",
            "direction": asked["direction"],
            "generation": 2,
            "first_lsn": 1,
            "dropped": {"first_lsn": asked["lsn"], "last_lsn": 9},
        }
        return httpx.Response(202, json=self.jobs[job_id])

    def _job(self, job_id: str) -> httpx.Response:
        if job_id not in self.jobs:
            return problem(404, "job_not_found")
        job = self.jobs[job_id]
        if self.job_steps[job_id]:
            self.jobs[job_id] = self.job_steps[job_id].pop(0)
        return httpx.Response(200, json=job)

    def _events(self, job_id: str) -> httpx.Response:
        lines = [": ping", ""]
        number = 0
        while True:
            number += 1
            job = self.jobs[job_id]
            ended = job["finished_at"] is not None
            data = json.dumps(job)
            lines += [
                f"id: {number}",
                f"event: {'ended' if ended else 'changed'}",
                f"data: {data}",
                "",
            ]
            if ended or self.events_broken:
                break
            self.jobs[job_id] = self.job_steps[job_id].pop(0)
        self.events_broken = False
        return httpx.Response(
            200,
            headers={"Content-Type": "text/event-stream"},
            content=streamed("\n".join([*lines, ""]).encode(), None),
        )

    def _page(self, request: httpx.Request, items: list[dict[str, Any]]) -> httpx.Response:
        start = int(request.url.params.get("cursor", 0))
        stop = start + min(self.page_items, int(request.url.params.get("limit", 100)))
        cursor = str(stop) if stop < len(items) else None
        return httpx.Response(200, json={"items": items[start:stop], "next_cursor": cursor})


def problem(
    status: int,
    code: str,
    *,
    detail: str = "",
    headers: dict[str, str] | None = None,
    **extras: Any,
) -> httpx.Response:
    body = {
        "type": f"urn:bop:problem:{code}",
        "title": code.replace("_", " "),
        "status": status,
        "detail": detail or f"It is {code}.",
        "code": code,
        "request_id": "r1",
        **extras,
    }
    answer = {"Content-Type": "application/problem+json", **(headers or {})}
    return httpx.Response(status, headers=answer, content=json.dumps(body).encode())


def job_members(job_id: str, kind: str, state: str, step: int) -> dict[str, Any]:
    ended = state in {"completed", "failed", "cancelled"}
    result = {"outcome": "published", "generation": 1, "first_lsn": 1, "last_lsn": 3}
    return {
        "id": job_id,
        "kind": kind,
        "tenant": "acme",
        "database": "events",
        "state": state,
        "stage": "uploading" if state == "in_flight" else None,
        "progress": {
            "staged_chunks": step,
            "uploaded_blobs": step,
            "total_chunks": 2,
            "uploaded_bytes": step * 1024,
            "total_bytes": 2048,
        },
        "attempts": 1,
        "reason": None,
        "created_at": TIME,
        "started_at": TIME if step else None,
        "finished_at": TIME if ended else None,
        "error": {"code": "lease_timeout", "detail": "No lease."} if state == "failed" else None,
        "result": {**result, "bytes_uploaded": 2048, "chunks": []}
        if state == "completed"
        else None,
    }


def records_of(media_type: str, body: bytes) -> list[bytes]:
    match media_type:
        case "application/octet-stream":
            return [body]
        case "application/x-ndjson":
            lines = body.split(b"\n")
            return lines[:-1] if lines[-1] == b"" else lines
    records, at = [], 0
    while at < len(body):
        length = struct.unpack_from("<I", body, at)[0]
        records.append(body[at + 4 : at + 4 + length])
        at += 4 + length
    return records


async def streamed(body: bytes, broken_after: int | None) -> AsyncIterator[bytes]:
    whole = body if broken_after is None else body[:broken_after]
    for at in range(0, len(whole), PIECE_BYTES):
        yield whole[at : at + PIECE_BYTES]
    if broken_after is not None:
        raise httpx.RemoteProtocolError(
            "peer closed connection without sending complete message body"
        )
