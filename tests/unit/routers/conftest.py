"""The real application over the in-process transport, with fake services behind it."""

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
from asgi_lifespan import LifespanManager

from app.core.base.clock import SeededRandomness, SystemClock
from app.core.base.events import Events
from app.main import create_app
from app.settings import Settings
from tests.helpers.fake_services import FakeService

BASE_URL = "http://service"


class Running:
    """An app that serves, what is behind it, and what it logged."""

    def __init__(self, **settings: Any) -> None:
        self.service = FakeService()
        self.logged: list[tuple[str, str, dict[str, Any]]] = []
        self.fatal: list[BaseException] = []
        self.settings = settings
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        events = Events(lambda name, level, fields: self.logged.append((name, level, dict(fields))))
        self.app = create_app(
            Settings(**self.settings),
            events=events,
            clock=self.settings.get("clock", SystemClock()),
            randomness=SeededRandomness(7),
            open_container=self.service.open,
            on_fatal=self.fatal.append,
        )
        manager = await self._stack.enter_async_context(LifespanManager(self.app))
        self.desk = self.app.state.desk
        self.client = await self._stack.enter_async_context(
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app=manager.app), base_url=BASE_URL, timeout=5
            )
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    async with Running(data_dir=tmp_path) as running:
        running.service.add_database("acme", "events")
        yield running


@pytest.fixture
def client(running: Running) -> httpx.AsyncClient:
    return running.client


@pytest.fixture
def service(running: Running) -> FakeService:
    return running.service


TOKENS: dict[str, dict[str, Any]] = {
    "all": {"scopes": ["read", "write", "checkpoint", "debug", "admin"], "tenants": None},
    "acme": {"scopes": ["read", "write", "checkpoint", "debug", "admin"], "tenants": ["acme"]},
    "zeta": {"scopes": ["read", "write", "checkpoint", "debug", "admin"], "tenants": ["zeta"]},
    "reader": {"scopes": ["read"], "tenants": None},
    "admin-only": {"scopes": ["admin"], "tenants": None},
}


def write_tokens(path: Path, tokens: dict[str, dict[str, Any]]) -> None:
    entries = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **entry}
        for name, entry in tokens.items()
    ]
    path.write_text(json.dumps({"tokens": entries}), encoding="utf-8")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.json"
    write_tokens(path, TOKENS)
    return path


@pytest.fixture
async def guarded(tmp_path: Path, tokens_file: Path) -> AsyncIterator[Running]:
    async with Running(data_dir=tmp_path, auth_tokens_file=tokens_file) as running:
        running.service.add_database("acme", "events")
        running.service.add_database("zeta", "events")
        yield running
