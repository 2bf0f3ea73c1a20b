"""Health, readiness, metrics, debug lists, the OpenAPI document, and how the process ends."""

import msgspec
import pytest

from app.container import Readiness
from app.core.base.errors import StartRefused, StorageFailure
from app.core.base.events import Events
from app.core.stores.manifest.ops import AdvanceCheckpointed
from app.core.stores.manifest.records import ChangeRecord
from app.main import OrderlyServer
from app.routers.route import ScopedRoute
from tests.helpers.fake_services import lease
from tests.unit.routers.conftest import Running


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"])
async def test_probes_may_ask_with_head(client, path):
    assert (await client.head(path)).status_code == 200


async def test_alive_and_ready(client, service):
    assert (await client.get("/healthz")).json() == {"status": "alive"}
    answer = await client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "reasons": [], "degraded": []}
    service.status = Readiness(status="ready", reasons=[], degraded=["remote"])
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["degraded"]) == (200, ["remote"])
    service.status = Readiness(status="starting", reasons=["no claim"], degraded=[])
    answer = await client.get("/readyz")
    assert (answer.status_code, answer.json()["reasons"]) == (503, ["no claim"])
    assert answer.headers["retry-after"] == "1"
    assert (await client.get("/healthz")).status_code == 200


async def test_a_fatal_error_takes_readiness_down_and_is_passed_on(running: Running):
    failure = StorageFailure("fsync failed")
    running.service.on_fatal(failure)
    assert running.fatal == [failure]
    assert running.service.failures == ["StorageFailure: fsync failed"]
    answer = await running.client.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (503, "failed")


async def test_a_refused_start_is_told_and_raised(tmp_path):
    running = Running(data_dir=tmp_path)
    running.service.failing["open"] = StartRefused("empty directory; use recover")
    with pytest.raises(StartRefused):
        async with running:
            pass
    assert [(name, fields["detail"]) for name, _, fields in running.logged] == [
        ("service.start_refused", "empty directory; use recover")
    ]


async def test_shutdown_is_begun_before_the_container_closes(tmp_path):
    async with Running(data_dir=tmp_path) as running:
        assert running.service.shutdowns == 0
    assert running.service.shutdowns >= 1
    assert running.desk.readiness().status == "starting"


async def test_the_server_ends_with_the_code_that_says_how(running: Running):
    server = OrderlyServer(running.app, running.desk.settings, events=Events())
    server.handle_exit(15, None)
    assert server.should_exit
    assert not server.failed
    assert server._captured_signals == []  # a signal that was asked for is not raised again
    server = OrderlyServer(running.app, running.desk.settings, events=Events())
    server.fail(StorageFailure("x"))
    assert server.should_exit
    assert server.failed


async def test_leases(client, service):
    service.leases_kept = [lease("acme", db_id=1, chunk_id=number) for number in range(3)]
    page = (await client.get("/debug/checkpoint/leases?limit=2")).json()
    assert page["items"][0] == {
        "tenant": "acme",
        "database": "events",
        "chunk_id": 0,
        "generation": 2,
        "job_id": "01JDB4N0Z8Q3V5W7X9Y1A2B3C4",
        "token": 17,
        "registered_at": "1970-01-01T00:00:00.000001Z",
        "expires_at": "1970-01-01T00:00:00.000002Z",
    }
    params = {"cursor": page["next_cursor"]}
    page = (await client.get("/debug/checkpoint/leases", params=params)).json()
    assert [item["chunk_id"] for item in page["items"]] == [2]


async def test_active_jobs(client, service):
    active = [service.add_job(state="in_flight"), service.add_job()]
    service.add_job(state="completed")
    items = (await client.get("/debug/checkpoint/active_jobs")).json()["items"]
    assert [job["id"] for job in items] == [job.job_id for job in reversed(active)]


def change(sequence: int, tenant: str = "acme") -> ChangeRecord:
    op = AdvanceCheckpointed(db_id=1, generation=1, lsn=sequence)
    return ChangeRecord(
        sequence=sequence,
        committed_at_us=sequence,
        reason="checkpoint.durable",
        db_id=1,
        tenant=tenant,
        database="events",
        generation=1,
        ops=(msgspec.Raw(msgspec.msgpack.encode(op)),),
    )


async def test_change_log(client, service):
    service.changes_kept = [change(number) for number in range(1, 6)]
    path = "/debug/manifest/change_log"
    page = (await client.get(f"{path}?after=1&limit=2")).json()
    assert [item["sequence"] for item in page["items"]] == [2, 3]
    assert page["items"][0] == {
        "sequence": 2,
        "committed_at": "1970-01-01T00:00:00.000002Z",
        "tenant": "acme",
        "database": "events",
        "generation": 1,
        "reason": "checkpoint.durable",
        "ops": [{"type": "AdvanceCheckpointed", "db_id": 1, "generation": 1, "lsn": 2}],
    }
    params = {"after": "1", "cursor": page["next_cursor"]}
    page = (await client.get(path, params=params)).json()
    assert [item["sequence"] for item in page["items"]] == [4, 5]
    assert len((await client.get(f"{path}?limit=1000")).json()["items"]) == 5


async def test_manifest_stats(client):
    assert (await client.get("/debug/manifest/stats")).json()["map_bytes"] == 1024


# --- metrics


async def test_metrics_are_text_or_openmetrics(client):
    text = await client.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    opened = await client.get("/metrics", headers=accept)
    assert opened.headers["content-type"].startswith("application/openmetrics-text")
    assert opened.text.endswith("# EOF\n")


async def test_requests_are_counted_by_route_never_by_path(client):
    await client.get("/tenants/acme/databases/events")
    await client.get("/tenants/acme/databases/nothing")
    await client.get("/no/such/path")
    await client.request("BREW", "/jobs")
    shown = (await client.get("/metrics")).text
    template = 'handler="/tenants/{tenant}/databases/{database}"'
    assert f'http_requests_total{{{template},method="GET",status="200"}} 1.0' in shown
    assert f'http_requests_total{{{template},method="GET",status="404"}} 1.0' in shown
    assert 'handler="none",method="GET",status="404"' in shown
    assert 'method="other"' in shown
    assert "acme" not in shown
    assert "BREW" not in shown


async def test_gauges_are_read_at_scrape_time(running: Running):
    shown = (await running.client.get("/metrics")).text
    assert "checkpoint_queue_depth 3.0" in shown
    assert "wal_bytes 4096.0" in shown
    assert "service_ready 1.0" in shown
    running.service.begin_shutdown()
    assert "service_ready 0.0" in (await running.client.get("/metrics")).text


# --- the document


CODES_OF_THE_CONTRACT = """
    malformed_records wal_invalid image_invalid unauthenticated forbidden self_approval
    database_not_found job_not_found snapshot_not_found page_not_found lease_not_found
    approval_not_found cursor_not_found not_found not_acceptable not_line_records
    database_conflict wrong_engine feature_disabled wal_gap page_size_mismatch wal_lost
    snapshot_pinned snapshot_exists no_generation job_already_ended queue_drained lsn_truncated
    generation_expired cursor_expired lsn_mismatch precondition_failed record_too_large
    body_too_large transaction_too_large unsupported_media_type range_not_satisfiable
    invalid_request idempotency_key_reused lsn_out_of_range backpressure corrupt_blob corrupt_wal
    internal not_ready remote_unavailable manifest_busy quota_exhausted disk_full manifest_full
"""
"""All but `method_not_allowed`, which no operation answers."""


@pytest.fixture
async def document(client):
    return (await client.get("/openapi.json")).json()


def operations(document):
    return [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


async def test_the_document_agrees_with_the_routes(running: Running, document):
    routes = {
        (route.path, method.lower())
        for route in running.app.routes
        if isinstance(route, ScopedRoute) and route.include_in_schema
        for method in route.methods
    }
    assert {(path, method) for path, method, _ in operations(document)} == routes
    operation_ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(operation_ids)) == len(operation_ids)


async def test_every_body_has_an_example(document):
    bodies = 0
    for path, method, operation in operations(document):
        contents = [operation.get("requestBody", {}).get("content", {})]
        contents += [one.get("content", {}) for one in operation["responses"].values()]
        for content in contents:
            for media_type, media in content.items():
                where = (path, method, media_type)
                assert media.get("example", media.get("examples")) not in (None, {}, []), where
                bodies += 1
    assert bodies > 100


async def test_examples_are_what_the_schemas_say(document):
    """By hand for the types used here: required members are there, and no others."""
    schemas = document["components"]["schemas"]
    checked = 0
    for name, schema in schemas.items():
        for example in schema.get("examples", []):
            assert set(schema.get("required", [])) <= set(example), name
            if schema.get("additionalProperties") is False:
                assert set(example) <= set(schema["properties"]), name
            checked += 1
    assert checked >= 12
    assert "HTTPValidationError" not in schemas


async def test_every_body_may_be_too_large_or_of_another_type(document):
    for path, method, operation in operations(document):
        if "requestBody" in operation:
            assert {"413", "415"} <= set(operation["responses"]), (method, path)


async def test_headers_that_clients_go_by_are_documented(document):
    wanted = {
        "401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After",
        "507": "Retry-After", "202": "Location",
    }  # fmt: skip
    lists = made = 0
    for path, method, operation in operations(document):
        for status, response in operation["responses"].items():
            headers = response["headers"]
            if status != "202" or "/lease/" not in path:
                assert wanted.get(status, "X-Request-ID") in headers, (method, path, status)
            if status == "201" and not path.endswith("/records"):
                made += 1
                assert "Location" in headers, path
            schema = response.get("content", {}).get("application/json", {}).get("schema", {})
            if schema.get("$ref", "").endswith("Page"):
                lists += 1
                assert "Link" in headers, path
    assert (lists, made) == (14, 4)


async def test_every_idempotency_key_is_explained(document):
    with_keys = 0
    for path, _, operation in operations(document):
        for parameter in operation.get("parameters", []):
            if parameter["name"] == "Idempotency-Key":
                with_keys += 1
                assert parameter["description"], path
                content = operation["responses"]["422"]["content"]["application/problem+json"]
                assert "idempotency_key_reused" in content["examples"], path
    assert with_keys == 7


async def test_every_code_of_the_contract_is_documented_and_no_other(document):
    shown = {
        example["value"]["code"]
        for _, _, operation in operations(document)
        for response in operation["responses"].values()
        for media in response.get("content", {}).values()
        for example in media.get("examples", {}).values()
        if "code" in example["value"]
    }
    assert shown == set(CODES_OF_THE_CONTRACT.split())


async def test_problems_and_security_are_documented(document):
    for path, _, operation in operations(document):
        responses = operation["responses"]
        assert "application/problem+json" in responses["422"]["content"], path
        assert "application/problem+json" in responses["500"]["content"], path
        if operation.get("security"):
            assert {"401", "403"} <= set(responses), path
        for status, response in responses.items():
            for example in (
                response.get("content", {})
                .get("application/problem+json", {})
                .get("examples", {})
                .values()
            ):
                assert example["value"]["status"] == int(status)
    assert {
        scheme
        for _, _, one in operations(document)
        for scheme in one.get("security", [])[:1]
        for scheme in scheme
    } == {"bearer"}


async def test_caches(client):
    answer = await client.get("/debug/cache")
    assert answer.status_code == 200
    assert answer.json() == {
        "page_cache": {
            "limit_bytes": 10, "used_bytes": 1, "entries": 2, "hits": 3, "misses": 4,
        },
        "hot_cache": {
            "limit_bytes": 20, "used_bytes": 6, "entries": 7, "hits": 8, "misses": 9,
        },
    }  # fmt: skip
