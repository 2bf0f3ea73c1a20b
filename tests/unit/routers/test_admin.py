"""Approvals and the audit log at the edge: who may, what is recorded, who sees it."""

import pytest
from fastapi import Request

from app.core.base.errors import ManifestBusy
from app.routers.auth import needs
from app.routers.route import ScopedRoute
from tests.unit.routers.conftest import Running, bearer

RELEASE = "/admin/checkpoint/lease/release/0?tenant=acme&database=events"
REASON = {"reason": "it hangs"}


@pytest.fixture
def admin(guarded: Running) -> Running:
    guarded.service.services.approvals.held = {("acme", "events", 0), ("zeta", "events", 0)}
    return guarded


async def ask(admin: Running, token: str = "all", path: str = RELEASE):
    return await admin.client.post(path, json=REASON, headers=bearer(token))


async def test_one_asks_and_another_approves(admin: Running):
    asked = await ask(admin)
    assert asked.status_code == 202
    approval = asked.json()
    assert (approval["state"], approval["released"]) == ("pending", False)
    path = f"/admin/approvals/{approval['approval_id']}"
    own = await admin.client.post(f"{path}/approve", headers=bearer("all"))
    assert (own.status_code, own.json()["code"]) == (403, "self_approval")
    other = await admin.client.post(f"{path}/approve", headers=bearer("admin-only"))
    assert other.status_code == 200
    done = other.json()
    assert (done["state"], done["released"], done["decided_by"]) == ("approved", True, "admin-only")
    again = await admin.client.post(f"{path}/reject", headers=bearer("all"))
    assert (again.status_code, again.json()["code"]) == (404, "approval_not_found")


async def test_without_approvals_it_is_done_at_once(admin: Running):
    admin.service.services.approvals.needed = False
    answer = await ask(admin)
    assert (answer.status_code, answer.json()["released"]) == (200, True)


async def test_another_tenants_approvals_do_not_exist(admin: Running):
    refused = await ask(admin, "zeta")
    assert (refused.status_code, refused.json()["code"]) == (404, "database_not_found")
    approval = (await ask(admin)).json()
    for step in ("approve", "reject"):
        path = f"/admin/approvals/{approval['approval_id']}/{step}"
        answer = await admin.client.post(path, headers=bearer("zeta"))
        assert (answer.status_code, answer.json()["code"]) == (404, "approval_not_found")
    for token, count in (("zeta", 0), ("acme", 1), ("all", 1)):
        listed = await admin.client.get("/admin/approvals", headers=bearer(token))
        assert len(listed.json()["items"]) == count


async def test_every_act_is_recorded_with_who_what_why_and_how_it_ended(admin: Running):
    await ask(admin)
    await ask(admin, path=RELEASE.replace("/0?", "/9?"))
    await admin.client.post(RELEASE, json={"because": 1}, headers=bearer("all"))
    await ask(admin, "zeta")
    await ask(admin, "reader")  # has not the scope: nothing was about to be done
    await admin.client.get("/admin/approvals", headers=bearer("all"))
    entries = (await admin.client.get("/admin/audit", headers=bearer("all"))).json()["items"]
    assert [(one["outcome"], one["status"], one["code"]) for one in entries] == [
        ("refused", 404, "database_not_found"),
        ("refused", 422, "invalid_request"),
        ("refused", 404, "lease_not_found"),
        ("done", 202, None),
    ]
    first = entries[-1]
    assert first["principal"] == "all"
    assert first["action"] == "POST /admin/checkpoint/lease/release/{chunk_id}"
    assert first["path"] == RELEASE
    assert (first["tenant"], first["reason"]) == ("acme", "it hangs")
    assert first["request"] == '{"reason":"it hangs"}'
    assert '"approval_id"' in first["answer"]


async def test_a_bound_token_sees_its_tenants_entries_only(admin: Running):
    await ask(admin)
    await ask(admin, "zeta", RELEASE.replace("acme", "zeta"))
    await ask(admin, "zeta")  # tries acme's: acme does not hear of it
    for token, tenants in (("acme", ["acme"]), ("zeta", ["zeta"]), ("all", [None, "zeta", "acme"])):
        listed = (await admin.client.get("/admin/audit", headers=bearer(token))).json()
        assert [one["tenant"] for one in listed["items"]] == tenants


async def test_what_cannot_be_recorded_is_not_done(admin: Running):
    admin.service.services.audit.failing = ManifestBusy()
    answer = await ask(admin)
    assert (answer.status_code, answer.json()["code"]) == (503, "manifest_busy")
    assert admin.service.services.approvals.rows == {}


async def test_an_admin_endpoint_that_knows_nothing_of_the_audit_log_is_in_it(admin: Running):
    @needs("admin")
    async def careless(request: Request) -> dict[str, int]:
        raise RuntimeError("a bug")

    route = ScopedRoute("/admin/careless", careless, methods=["POST"])
    admin.app.router.routes.insert(0, route)
    answer = await admin.client.post("/admin/careless", headers=bearer("admin-only"))
    assert answer.status_code == 500
    (entry,) = admin.service.services.audit.entries
    assert (entry.action, entry.outcome) == ("POST /admin/careless", "failed")


async def test_a_body_that_may_be_left_out_is_bounded_too(admin: Running):
    """The audit log reads it."""
    path, limit = "/admin/approvals/x/reject", admin.desk.settings.max_json_bytes
    refused = await admin.client.post(path, content=b"x" * (limit + 1), headers=bearer("all"))
    assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")
    assert admin.service.services.audit.entries == []
    taken = await admin.client.post(path, content=b'{"reason": "why"}', headers=bearer("all"))
    assert (taken.status_code, taken.json()["code"]) == (404, "approval_not_found")


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"reason": "\xe5"}', b'{"a":' * 100_000])
async def test_a_body_that_cannot_be_read_is_refused_and_recorded(admin: Running, body: bytes):
    headers = {**bearer("all"), "Content-Type": "application/json"}
    answer = await admin.client.post(RELEASE, content=body, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
