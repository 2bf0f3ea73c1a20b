import json
from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli.main import app
from app.cli.session import Surroundings
from tests.helpers.fake_api import FakeApi


class NoWaiting:
    """Time that never makes anyone wait."""

    def wall_ns(self) -> int:
        return 1_760_000_000_000_000_000

    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        del seconds


@dataclass
class Ran:
    exit_code: int
    stdout_bytes: bytes
    stderr: str

    @property
    def stdout(self) -> str:
        return self.stdout_bytes.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.stdout_bytes)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.stdout_bytes.splitlines()]

    @property
    def problem(self) -> Any:
        return json.loads(self.stderr)


class Cli:
    """The command line on the in-memory contract. An exception that escapes fails the test."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api

    def __call__(
        self,
        *arguments: str,
        input: bytes | None = None,  # noqa: A002 - as the runner names it
        env: dict[str, str] | None = None,
    ) -> Ran:
        result = CliRunner().invoke(
            app,
            list(arguments),
            input=input,
            env={"BOP_URL": None, "BOP_TOKEN": None, **(env or {})},
            catch_exceptions=False,
            obj=Surroundings(transport=self.api.transport(), clock=NoWaiting()),
        )
        return Ran(result.exit_code, result.stdout_bytes, result.stderr)

    def json(self, *arguments: str, **options: Any) -> Ran:
        return self("--output", "json", *arguments, **options)


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


@pytest.fixture
def cli(api: FakeApi) -> Cli:
    return Cli(api)
