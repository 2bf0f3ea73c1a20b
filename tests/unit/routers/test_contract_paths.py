"""Every path and method of the contract is there, each with its scope."""

import pytest

from app.main import create_app
from app.routers.auth import OPEN_PATHS
from app.routers.route import ScopedRoute
from app.settings import Settings

DATABASE = "/tenants/{tenant}/databases/{database}"
CONTRACT: dict[str, str] = {
    "/tenants/{tenant}/databases": "GET",
    DATABASE: "PUT GET DELETE PATCH",
    f"{DATABASE}/acknowledge-loss": "POST",
    f"{DATABASE}/durable": "GET",
    f"{DATABASE}/records": "POST GET",
    f"{DATABASE}/wal": "POST",
    f"{DATABASE}/image": "PUT GET HEAD",
    f"{DATABASE}/pages/{{page_no}}": "GET",
    f"{DATABASE}/generations": "GET",
    f"{DATABASE}/snapshots": "POST GET",
    f"{DATABASE}/snapshots/{{name}}": "GET DELETE",
    f"{DATABASE}/forks": "POST",
    "/checkpoints": "POST GET",
    "/checkpoints/{id}": "GET",
    "/checkpoints/{id}/cancel": "POST",
    "/checkpoints/{id}/events": "GET",
    "/jobs": "GET",
    "/jobs/{id}": "GET",
    "/jobs/{id}/cancel": "POST",
    "/truncations": "POST GET",
    "/truncations/{id}": "GET",
    "/cold-scan": "GET",
    "/healthz": "GET",
    "/readyz": "GET",
    "/metrics": "GET",
    "/debug/checkpoint/leases": "GET",
    "/debug/checkpoint/active_jobs": "GET",
    "/debug/manifest/change_log": "GET",
    "/debug/manifest/stats": "GET",
    "/debug/storage/quota": "GET",
    "/debug/cache": "GET",
    "/debug/wal": "GET",
    "/debug/blobs/explain": "GET",
    "/debug/jobs/{id}/explain": "GET",
    "/admin/checkpoint/lease/release/{chunk_id}": "POST",
    "/admin/approvals": "GET",
    "/admin/approvals/{approval_id}/approve": "POST",
    "/admin/approvals/{approval_id}/reject": "POST",
    "/admin/tenants/{tenant}/feature-flags": "GET PATCH",
    "/admin/tenants/{tenant}/quota": "PUT",
    "/admin/quota": "GET PUT",
    "/admin/janitor/run": "POST",
    "/admin/gc/run": "POST",
    "/admin/queue": "GET",
    "/admin/queue/drain": "POST",
    "/admin/queue/resume": "POST",
    "/admin/manifest/backup": "POST",
    "/admin/verifications": "POST",
    "/admin/downloads": "POST",
    "/admin/audit": "GET",
    "/change-cursors/{name}": "PUT DELETE",
    "/change-cursors/{name}/ack": "POST",
    "/changes": "GET",
}


@pytest.fixture(scope="module")
def routes(tmp_path_factory) -> dict[tuple[str, str], ScopedRoute]:
    app = create_app(Settings(data_dir=tmp_path_factory.mktemp("contract")))
    return {
        (route.path, method): route
        for route in app.routes
        if isinstance(route, ScopedRoute)
        for method in route.methods or ()
    }


@pytest.mark.parametrize("path", CONTRACT)
def test_the_contracts_paths_are_there(routes, path):
    for method in CONTRACT[path].split():
        route = routes[path, method]
        assert bool(route.scopes) == (path not in OPEN_PATHS)


def test_operators_paths_take_operators_scopes(routes):
    for (path, _), route in routes.items():
        for prefix, scope in (("/admin/", "admin"), ("/debug/", "debug")):
            assert path.startswith(prefix) == (scope in route.scopes), path
