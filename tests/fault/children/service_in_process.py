"""The whole service inside this process, spoken to over HTTP without a socket."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from asgi_lifespan import LifespanManager

from app.main import create_app
from app.settings import Settings


def settings_for(data_dir: Path) -> Settings:
    return Settings(
        data_dir=data_dir,
        checkpoint_interval_seconds=0,
        manifest_map_bytes=64 * 1024 * 1024,
        job_backoff_base_seconds=0.01,
        job_backoff_cap_seconds=0.05,
    )


@asynccontextmanager
async def service(data_dir: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A fatal error of the service is raised here, after it has closed."""
    fatal: list[BaseException] = []
    app = create_app(settings_for(data_dir), on_fatal=fatal.append)
    async with (
        LifespanManager(app, startup_timeout=30, shutdown_timeout=30),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", timeout=30
        ) as client,
    ):
        yield client
    if fatal:
        raise fatal[0]
