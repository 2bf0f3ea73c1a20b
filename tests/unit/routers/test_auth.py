"""No route without a scope; no tenant seen by another's token."""

import asyncio
import hashlib
import json
import re
import time

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import APIRouter, Request

from app.core.base.clock import rfc3339, wall_us
from app.core.base.errors import StartRefused
from app.core.base.events import Events
from app.core.stores.manifest.records import JobFailure
from app.main import create_app
from app.routers import auth, sse, tokens
from app.routers.auth import OPEN_PATHS, SCOPES, needs
from app.routers.route import ScopedRoute
from app.settings import Settings
from tests.helpers.fake_clock import FakeClock
from tests.helpers.fake_services import lease
from tests.helpers.wait import wait_until
from tests.unit.routers.asgi import RawExchange
from tests.unit.routers.conftest import TOKENS, Running, bearer, write_tokens

DOCUMENTS = {"/openapi.json"}


def concrete(path: str, tenant: str) -> str:
    """Whatever else a route's path names gets a value that fits a number and a name alike."""
    return re.sub(r"\{(\w+)(?::\w+)?\}", lambda found: KNOWN.get(found[1], "1"), path).replace(
        "TENANT", tenant
    )


KNOWN = {"tenant": "TENANT", "database": "events", "id": "01JDB4N0Z8Q3V5W7X9Y1A2B301"}


def routes_of(app):
    return [
        (route, method)
        for route in app.routes
        if isinstance(route, ScopedRoute)
        for method in sorted(route.methods)
    ]


def test_every_route_has_a_scope_or_is_open(tmp_path):
    app = create_app(Settings(data_dir=tmp_path))
    for route in app.routes:
        if route.path in DOCUMENTS:
            continue
        assert isinstance(route, ScopedRoute), f"{route.path} is not a ScopedRoute"
        assert route.scopes or route.path in OPEN_PATHS, f"{route.path} has no scope"
        assert route.scopes <= SCOPES
    assert {route.path for route, _ in routes_of(app) if not route.scopes} | DOCUMENTS == OPEN_PATHS


def test_a_route_without_a_scope_cannot_be_made():
    router = APIRouter(route_class=ScopedRoute)

    async def careless(request: Request) -> None: ...

    with pytest.raises(TypeError, match="names no scope"):
        router.get("/careless")(careless)
    with pytest.raises(TypeError, match="not one of the open paths"):
        router.get("/careless")(auth.open_to_all(careless))
    with pytest.raises(ValueError, match="at least one"):
        needs()


async def test_without_a_token_everything_but_the_open_paths_is_401(guarded: Running):
    for route, method in routes_of(guarded.app):
        answer = await guarded.client.request(method, concrete(route.path, "acme"))
        assert (answer.status_code == 401) == (route.path not in OPEN_PATHS), route.path
    for path in DOCUMENTS:
        assert (await guarded.client.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nothing"),
        ("DELETE", "/jobs"),
        ("GET", "/jobs?limit=x"),
        ("GET", "/tenants/BAD/databases"),
        ("PUT", "/tenants/acme/databases/x"),
    ],
)
async def test_401_comes_before_path_query_and_body(guarded: Running, method, path):
    answer = await guarded.client.request(method, path)
    assert answer.status_code == 401
    assert answer.json()["code"] == "unauthenticated"
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic all", "all", "Bearer nobody", "Bearer all all"]
)
async def test_headers_that_prove_nothing(guarded: Running, header):
    answer = await guarded.client.get("/jobs", headers={"Authorization": header})
    assert answer.status_code == 401


async def test_the_scheme_is_case_insensitive(guarded: Running):
    answer = await guarded.client.get("/jobs", headers={"Authorization": "bearer all"})
    assert answer.status_code == 200


async def test_scopes_are_needed_before_anything_is_validated(guarded: Running):
    for route, method in routes_of(guarded.app):
        if route.path in OPEN_PATHS:
            continue
        path = concrete(route.path, "acme")
        token = "reader" if "admin" in route.scopes else "admin-only"
        answer = await guarded.client.request(method, path, headers=bearer(token))
        assert answer.status_code == 403, path
        if method != "HEAD":
            assert answer.json()["code"] == "forbidden"


async def test_a_reader_reads_only(guarded: Running):
    client, headers = guarded.client, bearer("reader")
    assert (await client.get("/tenants/acme/databases/events", headers=headers)).status_code == 200
    assert (await client.get("/checkpoints", headers=headers)).status_code == 200
    body = {"engine": "append_only"}
    refused = await client.put("/tenants/acme/databases/new", json=body, headers=headers)
    assert refused.status_code == 403
    body = {"tenant": "acme", "database": "events"}
    assert (await client.post("/checkpoints", json=body, headers=headers)).status_code == 403
    assert (await client.get("/debug/manifest/stats", headers=headers)).status_code == 403


async def test_another_tenants_paths_answer_404_on_every_route(guarded: Running):
    """Also for names that no tenant could have, and for bodies that are not valid."""
    tried = 0
    for route, method in routes_of(guarded.app):
        if "{tenant}" not in route.path:
            continue
        for foreign in ("zeta", "nobody", "BAD"):
            answer = await guarded.client.request(
                method, concrete(route.path, foreign), content=b"{", headers=bearer("acme")
            )
            assert answer.status_code == 404, (method, route.path)
            tried += 1
            if method != "HEAD":
                assert answer.json()["code"] in {"database_not_found", "not_found"}
                assert foreign not in answer.text
    assert tried >= 24
    assert not guarded.service.record_contents("zeta")


async def test_another_tenants_jobs_do_not_exist(guarded: Running):
    mine = guarded.service.add_job(tenant="acme")
    other = guarded.service.add_job(tenant="zeta")
    client, headers = guarded.client, bearer("acme")
    missing = "01JDB4N0Z8Q3V5W7X9Y1A2B399"
    for base in ("/jobs", "/checkpoints"):
        listed = (await client.get(base, headers=headers)).json()["items"]
        assert [job["id"] for job in listed] == [mine.job_id]
        assert (await client.get(f"{base}/{mine.job_id}", headers=headers)).status_code == 200
        for method, suffix in (("GET", ""), ("GET", "?wait=1"), ("POST", "/cancel")):
            answers = [
                await client.request(method, f"{base}/{job_id}{suffix}", headers=headers)
                for job_id in (other.job_id, missing)
            ]
            texts = [
                answer.text.replace(job_id, "ID").replace(answer.headers["x-request-id"], "R")
                for answer, job_id in zip(answers, (other.job_id, missing), strict=True)
            ]
            assert answers[0].status_code == 404
            assert texts[0] == texts[1]  # not to be told from one that never was
    answer = await client.get(f"/checkpoints/{other.job_id}/events", headers=headers)
    assert answer.status_code == 404
    assert guarded.service.job_records[other.job_id].state == "pending"
    assert (await client.get("/jobs?tenant=zeta", headers=headers)).json()["items"] == []


async def test_forks_of_another_tenant_in_a_jobs_way_are_not_named(guarded: Running):
    pinned = JobFailure(
        kind="conflict",
        code="snapshot_pinned",
        title="Snapshots or forks still need it",
        detail="Chunks to be dropped are still needed by: acme/mine, kept, zeta/theirs.",
        fields={"names": ["acme/mine", "kept", "zeta/theirs"]},
    )
    add_job = guarded.service.add_job
    failed = add_job(tenant="acme", state="failed", error=pinned)
    pruned = {"outcome": "pruned", "kept_for_forks": ["acme/mine", "zeta/theirs"]}
    ended = add_job(tenant="acme", kind="prune_checkpoint", state="completed", result=pruned)
    for path in (f"/jobs/{failed.job_id}", "/jobs", f"/checkpoints/{failed.job_id}/events"):
        bound = (await guarded.client.get(path, headers=bearer("acme"))).text
        assert "acme/mine" in bound
        assert "forks of other tenants" in bound
        assert "zeta" not in bound
        unbound = (await guarded.client.get(path, headers=bearer("all"))).text
        assert "zeta/theirs" in unbound
    shown = (await guarded.client.get(f"/jobs/{failed.job_id}", headers=bearer("acme"))).json()
    assert shown["error"]["names"] == ["acme/mine", "kept"]
    shown = (await guarded.client.get(f"/jobs/{ended.job_id}", headers=bearer("acme"))).json()
    assert shown["result"]["kept_for_forks"] == ["acme/mine"]


async def test_a_body_that_names_another_tenant_meets_404(guarded: Running):
    body = {"tenant": "zeta", "database": "events"}
    for extra in ({}, {"Idempotency-Key": "k"}):
        answer = await guarded.client.post(
            "/checkpoints", json=body, headers={**bearer("acme"), **extra}
        )
        assert (answer.status_code, answer.json()["code"]) == (404, "database_not_found")
    assert guarded.service.job_records == {}


async def test_debug_lists_show_a_bound_token_its_own_only(guarded: Running):
    guarded.service.leases_kept = [
        lease("acme" if number % 2 else "zeta", db_id=number, chunk_id=0) for number in range(6)
    ]
    client = guarded.client
    seen, path = [], "/debug/checkpoint/leases?limit=2"
    while path:
        answer = await client.get(path, headers=bearer("acme"))
        page = answer.json()
        seen += [item["tenant"] for item in page["items"]]
        cursor = page["next_cursor"]
        path = cursor and f"/debug/checkpoint/leases?limit=2&cursor={cursor}"
    assert seen == ["acme"] * 3
    everything = await client.get("/debug/checkpoint/leases", headers=bearer("all"))
    assert len(everything.json()["items"]) == 6
    assert (await client.get("/debug/manifest/stats", headers=bearer("acme"))).status_code == 403


async def test_principals_do_not_share_idempotency_keys(guarded: Running):
    body, key = {"tenant": "acme", "database": "events"}, {"Idempotency-Key": "k"}
    jobs = {
        (
            await guarded.client.post("/checkpoints", json=body, headers={**bearer(token), **key})
        ).json()["id"]
        for token in ("all", "acme", "all")
    }
    assert len(jobs) == 2


async def test_the_file_is_read_again_when_it_changes(guarded: Running, tokens_file, monkeypatch):
    monkeypatch.setattr(tokens, "RELOAD_SECONDS", 0.0)
    client = guarded.client
    assert (await client.get("/jobs", headers=bearer("all"))).status_code == 200
    write_tokens(tokens_file, {"fresh": TOKENS["all"]})
    for _ in range(2):  # the first look may still be the one planned before
        guarded.app.state.authenticator.look_now()
        assert (await client.get("/jobs", headers=bearer("fresh"))).status_code == 200
        assert (await client.get("/jobs", headers=bearer("all"))).status_code == 401
    tokens_file.write_text("{", encoding="utf-8")
    guarded.app.state.authenticator.look_now()
    assert (await client.get("/jobs", headers=bearer("fresh"))).status_code == 200
    assert "auth.tokens_unreadable" in [name for name, _, _ in guarded.logged]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"tokens": [{"name": "a", "sha256": "xx", "scopes": []}]}),
        json.dumps({"tokens": [{"name": "a", "sha256": "ab", "scopes": []}]}),
        json.dumps({"tokens": [{"name": "a", "sha256": "0" * 64, "scopes": ["root"]}]}),
        json.dumps({"tokens": [{"name": "a", "sha256": "0" * 64, "scopes": [], "x": 1}]}),
    ],
)
def test_an_unusable_tokens_file_refuses_the_start(tmp_path, content):
    path = tmp_path / "tokens.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StartRefused, match="BOP_AUTH_TOKENS_FILE"):
        create_app(Settings(data_dir=tmp_path, auth_tokens_file=path))
    path.unlink()
    with pytest.raises(StartRefused):
        create_app(Settings(data_dir=tmp_path, auth_tokens_file=path))


async def test_tokens_are_never_logged(guarded: Running):
    for token in ("all", "secret-canary"):
        await guarded.client.get("/jobs?limit=x", headers=bearer(token))
    guarded.service.failing["databases.create"] = RuntimeError("x")
    await guarded.client.put(
        "/tenants/acme/databases/n", json={"engine": "libsql"}, headers=bearer("all")
    )
    assert guarded.logged
    assert "canary" not in repr(guarded.logged)
    assert "Bearer" not in repr(guarded.logged)


def entry(token: str, **fields) -> dict:
    digest = hashlib.sha256(token.encode()).hexdigest()
    return {"name": "ops", "sha256": digest, "scopes": ["read"], **fields}


async def test_a_token_is_exchanged_while_the_old_one_still_counts(tmp_path):
    """Two entries of one name are one principal; each has its own end."""
    clock = FakeClock()
    path = tmp_path / "tokens.json"
    old = entry("old", expires_at=rfc3339(wall_us(clock) + 60_000_000))
    path.write_text(json.dumps({"tokens": [old, entry("new")]}), encoding="utf-8")
    file = tokens.FileTokens(path, clock=clock, events=Events())
    file.open_blocking()
    assert await file.find(b"old") == await file.find(b"new") is not None
    clock.advance(59)
    assert await file.find(b"old") is not None
    clock.advance(1)
    assert await file.find(b"old") is None
    assert await file.find(b"new") is not None


async def test_a_jwt_is_taken_beside_the_tokens_file(tmp_path, tokens_file):
    """And one that has expired is 401 on every route that needs a token."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = jwt.algorithms.ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    jwks = tmp_path / "jwks.json"
    jwks.write_text(json.dumps({"keys": [{**public, "kid": "k", "alg": "ES256"}]}))

    def token(seconds: int) -> dict[str, str]:
        claims = {
            "iss": "https://id", "aud": "bop", "sub": "ann", "exp": int(time.time()) + seconds,
            "scope": "read", "tenants": ["acme"],
        }  # fmt: skip
        return bearer(jwt.encode(claims, key, "ES256", headers={"kid": "k"}))

    provider = {
        "oidc_issuer": "https://id", "oidc_audience": "bop", "oidc_jwks": str(jwks),
        "oidc_leeway_seconds": 0,
    }  # fmt: skip
    async with Running(data_dir=tmp_path, auth_tokens_file=tokens_file, **provider) as running:
        running.service.add_database("acme", "events")
        running.service.add_database("zeta", "events")
        client = running.client
        path = "/tenants/{}/databases/events"
        for headers, tenant, status in (
            (token(60), "acme", 200),
            (token(60), "zeta", 404),
            (bearer("all"), "zeta", 200),
            (token(-1), "acme", 401),
        ):
            answer = await client.get(path.format(tenant), headers=headers)
            assert answer.status_code == status
        for route, method in routes_of(running.app):
            if route.scopes:
                answer = await client.request(
                    method, concrete(route.path, "acme"), headers=token(-1)
                )
                assert answer.status_code == 401, route.path


async def test_with_a_port_of_their_own_operators_paths_exist_nowhere_else(tmp_path):
    async with Running(data_dir=tmp_path, admin_port=8601) as running:
        for path in ("/debug/checkpoint/leases", "/admin/audit"):
            answer = await running.client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
            there = await running.client.get(f"http://service:8601{path}")
            assert there.status_code == 200
        assert (await running.client.get("/jobs")).status_code == 200


async def test_a_stream_ends_with_its_token(guarded: Running, tokens_file, monkeypatch):
    monkeypatch.setattr(sse, "PING_SECONDS", 0.01)
    job = guarded.service.add_job()
    path = f"/checkpoints/{job.job_id}/events"
    raw = RawExchange("GET", path, headers=bearer("acme")).body(b"")
    following = asyncio.create_task(raw.run(guarded.app))
    await wait_until(lambda: raw.content.endswith(b": ping\n\n"))
    write_tokens(tokens_file, {name: TOKENS[name] for name in TOKENS if name != "acme"})
    guarded.app.state.authenticator.look_now()
    async with asyncio.timeout(10):
        await following
    assert raw.complete
    assert b"ended" not in raw.content
    assert guarded.service.waiting == 0
