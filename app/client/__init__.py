"""The async HTTP client that the command line and users share.

    async with BopClient("http://127.0.0.1:8600") as client:
        await client.databases.create("acme", "events", engine="append_only")
        await client.records.append_many("acme", "events", [b"one", b"two"])
        async for record in client.records.iter("acme", "events"):
            print(record.lsn, record.data)

Each group of methods speaks of one part of the contract. Every call is retried where that is
safe; what still fails is a ClientError.
"""

from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Self

import httpx

from app.client.admin import Admin
from app.client.calls import Calls, RetryPolicy, Timeouts
from app.client.collection import Collection
from app.client.databases import Databases
from app.client.failures import (
    ClientError,
    ProblemError,
    ServiceUnreachable,
    StreamBroken,
    UnexpectedAnswer,
)
from app.client.generation_jobs import GenerationJobs
from app.client.history import History
from app.client.images import Images
from app.client.jobs import Checkpoints, Jobs
from app.client.libsql import Libsql
from app.client.limits import Limits
from app.client.operations import Operations
from app.client.records import Record, RecordBatch, Records
from app.client.truncations import Truncations
from app.client.upkeep import Upkeep
from app.core.base.clock import Clock, Randomness, SystemClock, SystemRandomness

if TYPE_CHECKING:
    from app.client.cold_scans import ColdScans

__all__ = [
    "BopClient",
    "ClientError",
    "ProblemError",
    "Record",
    "RecordBatch",
    "RetryPolicy",
    "ServiceUnreachable",
    "StreamBroken",
    "Timeouts",
    "UnexpectedAnswer",
]

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class BopClient:
    """`transport` replaces the network; clock and randomness decide waits and keys."""

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        retry: RetryPolicy | None = None,
        timeouts: Timeouts | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock | None = None,
        randomness: Randomness | None = None,
    ) -> None:
        """Raises ValueError for a URL that is none, and for a token that no header can hold."""
        url = checked_url(base_url)
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            raise ValueError("the token is empty, or holds what is no printable ASCII")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # a proxy of the environment never stands between a host and its own loopback
        trust_env = url.host not in _LOOPBACK
        has_tls = (
            url.scheme == "https"
        )  # reading certificates takes time, which http can do without
        any_transport: object = transport  # httpx's own for tests serve both sorts of client
        self._http = httpx.AsyncClient(
            base_url=url,
            headers=headers,
            transport=transport,
            trust_env=trust_env,
            verify=has_tls,
        )
        self._calls = calls = Calls(
            self._http,
            clock=clock or SystemClock(),
            randomness=randomness or SystemRandomness(),
            retry=retry or RetryPolicy(),
            timeouts=timeouts or Timeouts(),
        )
        self.databases = Databases(calls)
        self.records = Records(calls, self.databases)
        self.libsql = Libsql(calls)
        self.history = History(calls)
        self.images = Images(
            calls,
            lambda: httpx.Client(
                base_url=url,
                headers=headers,
                transport=any_transport if isinstance(any_transport, httpx.BaseTransport) else None,
                trust_env=trust_env,
                verify=has_tls,
            ),
        )
        self.checkpoints = Checkpoints(calls)
        self.truncations = Truncations(calls)
        self.generation_jobs = GenerationJobs(calls)
        self.jobs = Jobs(calls)
        self.operations = Operations(calls)
        self.limits = Limits(calls)
        self.upkeep = Upkeep(calls)
        self.admin = Admin(calls)
        self.collection = Collection(calls)

    @cached_property
    def cold_scans(self) -> "ColdScans":
        from app.client.cold_scans import (  # noqa: PLC0415 - awscrt takes 40 ms to load
            ColdScans,
        )

        return ColdScans(self._calls)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()


def checked_url(text: str) -> httpx.URL:
    """Raises ValueError."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"{text!r} is not a URL: {error}") from error
    is_port = url.port is None or 0 < url.port < 65_536
    if url.scheme not in {"http", "https"} or not url.host or not is_port:
        raise ValueError(f"{text!r} is not a URL like http://127.0.0.1:8600")
    return url
