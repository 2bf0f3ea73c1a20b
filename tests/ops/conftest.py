"""A live service with people who may do something about it."""

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.numbered import Gate
from tests.helpers.runbooks import Operator
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess

SCOPES = {
    "app": ["read", "write"],
    "ann": ["read", "write", "checkpoint", "debug", "admin"],
    "bob": ["admin"],
}
"""An application's token; those of the one on call and of the one who approves."""

ANN = {"Authorization": "Bearer ann"}
CLEAN = "Everything agrees."

OnCall = Callable[[ServerProcess], Operator]


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    with SeaweedS3.running(tmp_path_factory.mktemp("seaweed") / "server") as server:
        yield server


@pytest.fixture
async def proxy(seaweed: SeaweedS3) -> AsyncIterator[FaultProxy]:
    async with FaultProxy.running("127.0.0.1", seaweed.port) as proxy:
        yield proxy


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, str]:
    """The setting that makes a service know SCOPES; each token is its name."""
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "scopes": scopes}
        for name, scopes in SCOPES.items()
    ]
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps({"tokens": entries}))
    return {"BOP_AUTH_TOKENS_FILE": str(path)}


@pytest.fixture
def s3_settings(seaweed: SeaweedS3, proxy: FaultProxy) -> Mapping[str, str]:
    """A bucket of its own, behind the proxy."""
    return {
        "BOP_REMOTE_URL": f"s3://{seaweed.bucket()}/ops",
        "BOP_S3_ENDPOINT_URL": proxy.endpoint,
        "BOP_S3_REGION": seaweed.region,
        **seaweed.environment(),
    }


@pytest.fixture
def on_call(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OnCall]:
    """Opens the page that the test is named after. The test has to go down all of it."""
    opened: list[Operator] = []
    failed_before = request.session.testsfailed

    def call(server: ServerProcess) -> Operator:
        work = tmp_path / "operator"
        work.mkdir()
        operator = Operator(
            page=page_of(request.function.__name__), server=server, work=work,
            token="ann", second_token="bob",
            variables={"TENANT": "acme", "DATABASE": "log"},
        )  # fmt: skip
        opened.append(operator)
        return operator

    yield call
    if request.session.testsfailed == failed_before:
        assert [operator.left for operator in opened] == [[]], "blocks that were not run"


def page_of(test_name: str) -> str:
    return test_name.removeprefix("test_").replace("_", "-")


def as_application(server: ServerProcess) -> httpx.AsyncClient:
    """The server's own client, with the application's token."""
    server.client.headers["Authorization"] = "Bearer app"
    return server.client


async def ended_checkpoint(client: httpx.AsyncClient, database: str = "log") -> dict[str, Any]:
    body = {"tenant": "acme", "database": database}
    answer = await client.post("/checkpoints", json=body, headers=ANN)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = (await client.get(f"/jobs/{answer.json()['id']}?wait=30")).json()
    assert job["state"] == "completed", job
    return job
