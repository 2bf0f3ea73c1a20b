"""POST and GET /truncations."""

import json

import pytest

from app.core.base.errors import FeatureDisabled, WalLost
from tests.unit.routers.conftest import Running, bearer, write_tokens

BODY = {"tenant": "acme", "database": "events", "direction": "head", "lsn": 1}


@pytest.fixture(autouse=True)
def database(service):
    service.add_database("acme", "events")


async def test_it_is_accepted_as_a_job(client, service):
    answer = await client.post("/truncations", json=BODY)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/truncations/{job['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert (job["kind"], job["state"]) == ("truncate_append_only", "pending")
    assert service.job_records[job["id"]].params == {
        "direction": "head", "lsn": 1, "on_lease": "wait", "lease_timeout_seconds": 30,
    }  # fmt: skip


async def test_what_is_asked_is_handed_on(client, service):
    asked = {**BODY, "direction": "tail", "on_lease": "cancel", "lease_timeout_seconds": 1.5}
    job = (await client.post("/truncations", json=asked)).json()
    assert service.job_records[job["id"]].params == {
        "direction": "tail", "lsn": 1, "on_lease": "cancel", "lease_timeout_seconds": 1.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"lsn": 0},
        {"lsn": "1"},
        {"lsn": 2**63},
        {"direction": "both"},
        {"on_lease": "steal"},
        {"lease_timeout_seconds": -1},
        {"lease_timeout_seconds": 3601},
        {"force": True},
        {"database": "../x"},
    ],
)
async def test_bodies_that_are_refused(client, service, changes):
    answer = await client.post("/truncations", json={**BODY, **changes})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert service.job_records == {}


@pytest.mark.parametrize("missing", ["tenant", "database", "direction", "lsn"])
async def test_what_a_body_must_say(client, missing):
    body = {name: value for name, value in BODY.items() if name != missing}
    assert (await client.post("/truncations", json=body)).status_code == 422


@pytest.mark.parametrize(
    ("error", "status"), [(FeatureDisabled("off"), 409), (WalLost("lost"), 409)]
)
async def test_refusals_of_the_service(client, service, error, status):
    service.failing["truncations.request"] = error
    answer = await client.post("/truncations", json=BODY)
    assert (answer.status_code, answer.json()["code"]) == (status, error.code)


async def test_an_lsn_out_of_range(client):
    answer = await client.post("/truncations", json={**BODY, "lsn": 9})
    assert (answer.status_code, answer.json()["code"]) == (422, "lsn_out_of_range")
    assert answer.json()["next_lsn"] == 1


async def test_a_key_gives_the_first_answer_again(client, service):
    key = {"Idempotency-Key": "k"}
    first = await client.post("/truncations", json=BODY, headers=key)
    again = await client.post("/truncations", json=BODY, headers=key)
    assert (again.status_code, again.content) == (202, first.content)
    assert again.headers["location"] == first.headers["location"]
    assert len(service.job_records) == 1
    other = await client.post("/truncations", json={**BODY, "direction": "tail"}, headers=key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


async def test_only_truncations_are_listed_and_shown(client, service):
    checkpoint = service.add_job()
    job = (await client.post("/truncations", json=BODY)).json()
    assert (await client.get("/truncations")).json()["items"] == [job]
    assert (await client.get("/truncations", params={"state": "failed"})).json()["items"] == []
    assert (await client.get(f"/truncations/{job['id']}")).json() == job
    missing = await client.get(f"/truncations/{checkpoint.job_id}")
    assert (missing.status_code, missing.json()["code"]) == (404, "job_not_found")


async def test_the_document_shows_how(client):
    document = (await client.get("/openapi.json")).json()
    posted = document["paths"]["/truncations"]["post"]
    assert {"202", "404", "409", "422", "429", "507"} <= posted["responses"].keys()
    body = document["components"]["schemas"]["TruncateBody"]
    assert json.dumps(body["examples"])


async def test_who_may_truncate_may_cancel_that_and_nothing_else(tmp_path):
    tokens = tmp_path / "tokens.json"
    scopes = {"writer": ["write"], "checkpointer": ["checkpoint"], "reader": ["read"]}
    write_tokens(tokens, {name: {"scopes": one, "tenants": None} for name, one in scopes.items()})
    async with Running(data_dir=tmp_path, auth_tokens_file=tokens) as running:
        running.service.add_database("acme", "events")
        client, writer = running.client, bearer("writer")
        for token in ("checkpointer", "reader"):
            refused = await client.post("/truncations", json=BODY, headers=bearer(token))
            assert refused.status_code == 403
        truncation = (await client.post("/truncations", json=BODY, headers=writer)).json()["id"]
        checkpoint = running.service.add_job().job_id
        refused = await client.post(f"/jobs/{checkpoint}/cancel", headers=writer)
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        refused = await client.post(f"/jobs/{truncation}/cancel", headers=bearer("reader"))
        assert refused.status_code == 403
        told = await client.post(f"/jobs/{truncation}/cancel", headers=writer)
        assert told.status_code == 202
        told = await client.post(f"/jobs/{checkpoint}/cancel", headers=bearer("checkpointer"))
        assert told.status_code == 202
