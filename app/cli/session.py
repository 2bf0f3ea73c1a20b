"""What every command that talks to a service shares: where it is, who asks, how to show."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import typer

from app.cli.failures import API_HINTS, HINTS, Failure, wrong_usage
from app.cli.screen import Screen
from app.core.base.clock import Clock, SystemClock
from app.core.base.ids import is_name

if TYPE_CHECKING:
    import httpx

    from app.client import BopClient, ClientError, RetryPolicy

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8600"

# httpx's own command line, which brings rich, click and pygments: 50 ms that nothing here needs
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a test puts in the place of the network and of time."""

    transport: "httpx.AsyncBaseTransport | None" = None
    clock: Clock | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    url: str
    token: str | None
    screen: Screen
    surroundings: Surroundings

    @property
    def clock(self) -> Clock:
        return self.surroundings.clock or SystemClock()

    def run(
        self,
        work: "Callable[[BopClient], Awaitable[T]]",
        *,
        retry: "RetryPolicy | None" = None,
    ) -> T:
        """Runs `work` with a client of its own. Raises Failure for all that is expected."""
        from app.client import BopClient, ClientError  # noqa: PLC0415 - 0.3 s that --help can do without

        async def connected() -> T:
            async with client:
                return await work(client)

        try:
            client = BopClient(
                self.url,
                self.token,
                retry=retry,
                transport=self.surroundings.transport,
                clock=self.surroundings.clock,
            )
        except ValueError as error:
            raise wrong_usage(f"--url or --token: {error}.") from error
        try:
            return asyncio.run(connected())
        except ClientError as error:
            raise explained(error) from error


def session_of(context: typer.Context) -> Session:
    session = context.obj
    assert isinstance(session, Session), "the root command makes the session"
    return session


def explained(error: "ClientError") -> Failure:
    """What a client's error means for who typed the command."""
    from app.client import ProblemError, ServiceUnreachable  # noqa: PLC0415 - see Session.run

    match error:
        case ProblemError(code="unexpected_answer"):
            return Failure(
                f"What answered is no bop-checkpoint service: {error.status} {error.title}.",
                hint="See --url or BOP_URL; perhaps a proxy is in between.",
                code=error.code,
                members={"status": error.status},
            )
        case ProblemError():
            hint = HINTS.get(error.code, "")
            told = error.detail or error.title
            return Failure(
                told.removesuffix(f" {API_HINTS[error.code]}") if hint else told,
                hint=hint,
                code=error.code,
                members={**error.extras, "status": error.status, "title": error.title},
            )
        case ServiceUnreachable():
            return Failure(
                f"No service answers at {error.url}: {error.reason}.",
                hint="Start one with 'bop-checkpoint serve', or say where it is with --url "
                "or BOP_URL.",
                code="unreachable",
                members={"url": error.url},
            )
        case _:
            return Failure(f"{error}", code="unexpected_answer")


def parse_name(text: str) -> tuple[str, str]:
    """TENANT/DATABASE."""
    tenant, slash, database = text.partition("/")
    if not slash or not is_name(tenant) or not is_name(database):
        raise typer.BadParameter(
            f"{text!r} is not TENANT/DATABASE; names are a-z, 0-9, '.', '_' and '-', 63 at most."
        )
    return tenant, database


def parse_tenant(text: str) -> str:
    if not is_name(text):
        raise typer.BadParameter(f"{text!r} is no tenant; names are a-z, 0-9, '.', '_' and '-'.")
    return text


def parse_plain_name(text: str | None) -> str | None:
    """Of a snapshot, a tenant or a database, as a callback of its parameter."""
    if text is not None and not is_name(text):
        raise typer.BadParameter(
            f"{text!r} is no name; names are a-z, 0-9, '.', '_' and '-', 63 at most."
        )
    return text


def parse_id(text: str) -> str:
    """Of a job or an approval, as a callback of its parameter."""
    if not (text.isascii() and text.isalnum()):
        raise typer.BadParameter(f"{text!r} is no id; ids are letters and digits.")
    return text
