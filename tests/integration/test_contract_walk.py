"""Every route of the real service, whoever adds it: who is let in, what is refused, what is said.

The routes come from the application itself, bodies and parameters from its OpenAPI document.
"""

import asyncio
import json
import re
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.routers.paging import encode_cursor
from tests.conftest import MakeServer
from tests.helpers.access import Principals, Route, guarded_routes
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import scratch_left

LIMIT_BYTES = 8000
JSON = {"Content-Type": "application/json"}
EXAMPLES = 6
NAMES = {
    "tenant": "acme", "database": "events", "id": "01JDB4N0Z8Q3V5W7X9Y1A2B301", "name": "one",
    "approval_id": "01JDB4N0Z8Q3V5W7X9Y1A2B301",
}  # fmt: skip
OTHERS = "zeta"
"""The tenant whose things acme's token must not see."""
HOSTILE = (
    "..", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%5c..", "%00", "a%00b", "a%2fb", ".",
    "%25%32%65", "....%2f%2f", "%ff%fe", "%e2%80%ae", "%0d%0aX-Injected:%201", "a" * 300, "-1",
    "9" * 40, "NaN", "'%20OR%201=1--", "%7b%7d",
)  # fmt: skip

FORGED_KEYS = (2**70, -1, 2**64, 1.5, [2**70, 1], [1, -1], "x" * 350, "\0", None, {})


def forged_cursors(path: str) -> list[str]:
    return [*(encode_cursor(key, path=path) for key in FORGED_KEYS), "%00", "AAA", "="]


def small_image() -> bytes:
    """A SQLite database of a few pages of 512 bytes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "app.db"
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA page_size=512")
            connection.execute("CREATE TABLE notes (text)")
            connection.executemany("INSERT INTO notes VALUES (?)", [("a note" * 9,)] * 20)
        connection.close()
        return path.read_bytes()


class Walk:
    """A service with two tenants' databases in it, the routes, and the document."""

    def __init__(self, server: ServerProcess, principals: Principals, routes: list[Route]) -> None:
        self.server, self.principals, self.routes = server, principals, routes
        self.document: dict[str, Any] = {}

    async def prepare(self) -> None:
        client, headers = self.server.client, self.principals.bearer("all")
        self.document = (await client.get("/openapi.json")).json()
        for tenant in ("acme", OTHERS):
            root = f"/tenants/{tenant}/databases"
            for name, body in (
                ("events", {"engine": "append_only"}),
                ("app", {"engine": "libsql", "page_size": 512}),
            ):
                made = await client.put(f"{root}/{name}", json=body, headers=headers)
                assert made.status_code == 201
            image = await asyncio.to_thread(small_image)
            stored = await client.put(f"{root}/app/image", content=image, headers=headers)
            assert stored.status_code == 200
            answer = await client.post(
                f"/tenants/{tenant}/databases/events/records",
                content=b"secret of " + tenant.encode(),
                headers={**headers, "Content-Type": "application/octet-stream"},
            )
            assert answer.status_code == 201
            for name in ("events", "app"):
                asked = {"tenant": tenant, "database": name}
                job = (await client.post("/checkpoints", json=asked, headers=headers)).json()
                ended = await client.get(f"/checkpoints/{job['id']}?wait=20", headers=headers)
                assert ended.json()["state"] == "completed"
                made = await client.post(
                    f"{root}/{name}/snapshots", json={"name": "one"}, headers=headers
                )
                assert made.status_code == 201

    async def ask(
        self,
        route: Route,
        headers: dict[str, str],
        path: str | None = None,
        *,
        tenant: str = "acme",
        content: bytes | None = None,
    ) -> httpx.Response:
        """With the example body of the document, where it has one and none is given."""
        body = self.body_of(route, tenant)
        if content is not None:
            body = {"content": content, "headers": body.get("headers", JSON)}
        request = self.server.client.build_request(
            route.method,
            self.path_of(route) if path is None else path,
            headers={**headers, **body.pop("headers", {})},
            **body,
        )
        return await self.server.client.send(request)

    def path_of(self, route: Route, tenant: str = "acme", **changes: str) -> str:
        """With what the query must have, and the tenant where it may."""
        names = {**NAMES, "tenant": tenant, **changes}
        path = re.sub(r"\{(\w+)\}", lambda found: names.get(found[1], "1"), route.path)
        needed = {
            one["name"]: names.get(one["name"], "1")
            for one in self.operation(route).get("parameters", ())
            if one["in"] == "query" and (one.get("required") or one["name"] == "tenant")
        }
        return f"{path}?{httpx.QueryParams(needed)}" if needed else path

    def operation(self, route: Route) -> dict[str, Any]:
        """HEAD is as GET."""
        operations = self.document["paths"][route.path]
        return operations.get(route.method.lower()) or operations["get"]

    def media_type(self, route: Route) -> str | None:
        content = self.operation(route).get("requestBody", {}).get("content", {})
        return next(iter(content), None)

    def body_of(self, route: Route, tenant: str = "acme") -> dict[str, Any]:
        media_type = self.media_type(route)
        if media_type is None:
            return {}
        if media_type != "application/json":
            return {"content": b"x", "headers": {"Content-Type": media_type}}
        media = self.operation(route)["requestBody"]["content"][media_type]
        example = media.get("example") or next(iter(media["examples"].values()))["value"]
        if "tenant" in example:
            example = {**example, "tenant": tenant}
        return {"json": example}

    def names_tenant(self, route: Route) -> bool:
        """In the path, the query or the body."""
        parameters = self.operation(route).get("parameters", ())
        body = self.body_of(route).get("json")
        return any(one["name"] == "tenant" for one in parameters) or (
            isinstance(body, dict) and "tenant" in body
        )


@pytest.fixture
async def walk(make_server: MakeServer, tmp_path: Path) -> Walk:
    principals = Principals(tmp_path)
    server = make_server(
        settings={
            **principals.settings,
            "BOP_MAX_JSON_BYTES": str(LIMIT_BYTES),
            "BOP_MAX_APPEND_BYTES": str(LIMIT_BYTES),
            "BOP_MAX_WAL_BYTES": str(LIMIT_BYTES),
            "BOP_MAX_IMAGE_BYTES": str(LIMIT_BYTES),
            "BOP_LOG_LEVEL": "warning",
        }
    )
    await server.start()
    walk = Walk(server, principals, guarded_routes(tmp_path))
    await walk.prepare()
    return walk


def problem(answer: httpx.Response) -> tuple[int, str]:
    if not answer.content:  # HEAD
        return answer.status_code, ""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    return answer.status_code, answer.json()["code"]


async def test_who_is_let_in(walk: Walk):
    """No token, one that has expired, one with every scope but the right one."""
    assert len(walk.routes) > 40
    for route in walk.routes:
        for headers in ({}, walk.principals.bearer("nobody"), walk.principals.jwt(seconds=-5)):
            answer = await walk.ask(route, headers)
            assert problem(answer) in {(401, "unauthenticated"), (401, "")}, route
        answer = await walk.ask(route, walk.principals.without(route.scopes))
        assert problem(answer) in {(403, "forbidden"), (403, "")}, route
    valid = await walk.server.client.get("/jobs", headers=walk.principals.jwt(seconds=60))
    assert valid.status_code == 200


async def test_another_tenant_does_not_exist(walk: Walk):
    """Whatever names it, in the path, the query or the body: 404 as for one that never was, and
    not a word of its own in any answer.
    """
    headers, tried = walk.principals.bearer("acme"), 0
    for route in walk.routes:
        if walk.names_tenant(route):
            tried += 1
            statuses = []
            for tenant in (OTHERS, "nobody"):
                answer = await walk.ask(route, headers, walk.path_of(route, tenant), tenant=tenant)
                statuses.append(problem(answer) if answer.status_code != 200 else (200, ""))
                if answer.status_code == 200:  # a list that is filtered by tenant is empty
                    assert answer.json()["items"] == [], route
                else:
                    assert answer.status_code in {403, 404}, (route, answer.text)
                assert "secret" not in answer.text
            assert statuses[0] == statuses[1], route
        else:
            answer = await walk.ask(route, headers)
            assert answer.status_code < 500, (route, answer.text)
            shown = answer.text.replace(walk.path_of(route), "")
            assert f'"{OTHERS}"' not in shown, (route, shown)
    assert tried > 20
    mine = (await walk.server.client.get("/tenants/zeta/databases/events",
                                         headers=walk.principals.bearer("all"))).json()  # fmt: skip
    assert (mine["state"], mine["next_lsn"]) == ("active", 2)


async def test_what_concerns_all_tenants_is_not_for_one(walk: Walk):
    """A token bound to a tenant changes nothing that is everybody's."""
    headers = walk.principals.bearer("acme")
    refused = 0
    for route in walk.routes:
        if route.path.startswith("/admin/") and not walk.names_tenant(route):
            answer = await walk.ask(route, headers)
            if route.method == "GET" and answer.status_code == 200:
                assert f'"{OTHERS}"' not in answer.text, route
                continue
            assert answer.status_code in {403, 404}, (route, answer.text)
            refused += 1
    assert refused >= 1


async def test_bodies_that_are_too_large(walk: Walk):
    headers, tried = walk.principals.bearer("all"), 0
    for route in walk.routes:
        media_type = walk.media_type(route)
        if media_type is None:
            continue
        tried += 1
        body = b'{"x": "' + b"x" * (2 * LIMIT_BYTES) + b'"}'
        path = walk.path_of(route, database="app" if "image" in route.path else "events")
        if route.path.endswith("/wal"):
            path = walk.path_of(route, database="app")
        answer = await walk.ask(route, headers, path, content=body)
        assert problem(answer) == (413, "body_too_large"), (route, answer.text)
    assert tried >= 10


async def test_paths_that_lead_elsewhere(walk: Walk):
    """In every parameter of every route: an answer of our own, nothing made, nothing reached."""
    headers = walk.principals.bearer("all")
    before = sorted(str(path) for path in walk.server.data_dir.parent.iterdir())

    async def tried(route: Route, path: str) -> None:
        answer = await walk.ask(route, headers, path)
        assert answer.status_code < 500, (route, path, answer.text)
        assert "X-Injected" not in answer.headers
        assert "root:" not in answer.text

    for route in walk.routes:
        base = walk.path_of(route)
        for name in re.findall(r"\{(\w+)\}", route.path):
            await asyncio.gather(
                *(tried(route, walk.path_of(route, **{name: value})) for value in HOSTILE)
            )
        for one in walk.operation(route).get("parameters", ()):
            if one["in"] == "query" and one["name"] != "wait":
                joint = "&" if "?" in base else "?"
                path = base.partition("?")[0]
                values = forged_cursors(path) if one["name"] == "cursor" else HOSTILE[::2]
                await asyncio.gather(
                    *(tried(route, f"{base}{joint}{one['name']}={value}") for value in values)
                )
    assert sorted(str(path) for path in walk.server.data_dir.parent.iterdir()) == before
    assert scratch_left(walk.server.data_dir) == []
    assert (await walk.server.client.get("/healthz")).status_code == 200


async def test_the_service_does_what_its_document_says(walk: Walk):
    """schemathesis over every operation: no 500, no status, media type or shape that is not
    documented.
    """
    found = await asyncio.to_thread(conversation, walk, "all")
    assert not found, "\n\n".join(found[:5])
    client, headers = walk.server.client, walk.principals.bearer("all")

    async def at_rest() -> bool:
        active = await client.get("/debug/checkpoint/active_jobs", headers=headers)
        return active.json()["items"] == []

    await wait_until(at_rest, timeout=30)
    report = (await client.get("/debug/manifest/fsck", headers=headers)).json()
    assert report["findings"] == []


async def test_the_document_says_what_another_tenants_token_meets(walk: Walk):
    """Generated requests that name acme, with zeta's token: nothing but 403 and 404."""
    found = await asyncio.to_thread(conversation, walk, "zeta", only_tenant="acme")
    assert not found, "\n\n".join(found[:5])


CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_schema_conformance,
]  # fmt: skip


def _calm_first(operation: schemathesis.APIOperation) -> tuple[bool, bool, str]:
    """What deletes or drains comes last, so that the others have something to talk about."""
    return operation.method == "delete", "/admin/" in operation.path, operation.path


def name_what_exists(case: schemathesis.Case) -> None:
    """Names that are generated are those of nothing, and end in 404: most are replaced."""
    body = case.body if isinstance(case.body, dict) else {}
    seed = sum(map(ord, json.dumps([case.path_parameters, case.query], default=str)))
    names = {"tenant": "acme", "database": ("events", "app", "events", "none")[seed % 4]}
    for place in (case.path_parameters, case.query, body):
        for name, value in names.items():
            if isinstance(place.get(name), str):
                place[name] = value
    if "page_no" in case.path_parameters:
        case.path_parameters["page_no"] = 1 + seed % 3


def conversation(walk: Walk, token: str, *, only_tenant: str | None = None) -> list[str]:
    """What was wrong. With `only_tenant`, of operations that name it in their path."""
    schema = schemathesis.openapi.from_dict(walk.document)
    found: list[str] = []
    headers = walk.principals.bearer(token)
    for operation in sorted((one.ok() for one in schema.get_all_operations()), key=_calm_first):
        if only_tenant is not None and "{tenant}" not in operation.path:
            continue

        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
        )  # fmt: skip
        @given(operation.as_strategy())
        def talk(case: schemathesis.Case) -> None:
            case.query.pop("wait", None)  # not a minute each
            name_what_exists(case)
            if only_tenant is not None:
                case.path_parameters["tenant"] = only_tenant
            response = case.call(base_url=walk.server.base_url, headers=headers, timeout=20)
            if only_tenant is not None:
                assert response.status_code in {403, 404, 405}, case.as_curl_command()
            case.validate_response(response, checks=CHECKS)

        try:
            talk()
        except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - one hides no other
            found.append(f"{operation.method} {operation.path}: {json.dumps(str(error))[:1500]}")
    return found
