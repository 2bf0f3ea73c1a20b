"""SQLite databases: push their WAL, put an image, read one back.

Bodies come from files and are made anew for each attempt. Pushing WAL is not sent again by itself
when a connection fails: whoever follows a log asks the service where it stands, and goes on there.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import httpx
import msgspec

from app.client.calls import Calls, Content, decoded
from app.client.databases import database_path
from app.client.failures import ProblemError, UnexpectedAnswer
from app.client.wire import ImageStored, WalPosition, WalStored

OCTETS = "application/octet-stream"


class Libsql:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def push_wal(
        self,
        tenant: str,
        database: str,
        body: Content,
        *,
        content_bytes: int,
        offset: int,
        after_lsn: int | None = None,
    ) -> WalStored:
        """Stores the body up to its last commit. Raises ProblemError, with `wal_gap` (see
        `wal_position`) where the log does not go on at `offset`.
        """
        response = await self._calls.send(
            "POST",
            f"{database_path(tenant, database)}/wal",
            params={"offset": offset, "after_lsn": after_lsn},
            content=body,
            headers={"Content-Type": OCTETS, "Content-Length": str(content_bytes)},
        )
        return decoded(response, WalStored)

    async def put_image(
        self,
        tenant: str,
        database: str,
        body: Content,
        *,
        content_bytes: int,
        position: Mapping[str, int] | None = None,
    ) -> ImageStored:
        """Makes a database file the content. `position`: salt1, salt2, offset, checksum1 and
        checksum2 of the place in the application's WAL that the image includes.
        """
        response = await self._calls.send(
            "PUT",
            f"{database_path(tenant, database)}/image",
            params=position,
            content=body,
            headers={"Content-Type": OCTETS, "Content-Length": str(content_bytes)},
        )
        return decoded(response, ImageStored)

    @asynccontextmanager
    async def image(
        self,
        tenant: str,
        database: str,
        *,
        generation: int | None = None,
        snapshot: str | None = None,
        at: datetime | None = None,
        first_byte: int = 0,
        etag: str | None = None,
    ) -> AsyncIterator[httpx.Response]:
        """The database as a file, its body unread; the newest state unless one is chosen. With
        `first_byte` the rest from there (206), as long as the state is still that of `etag`;
        the whole of another state otherwise (200).
        """
        headers = {}
        if first_byte > 0 and etag is not None:
            headers = {"Range": f"bytes={first_byte}-", "If-Range": etag}
        async with self._calls.stream(
            f"{database_path(tenant, database)}/image",
            params={
                "generation": generation,
                "snapshot": snapshot,
                "at": None if at is None else at.isoformat().replace("+00:00", "Z"),
            },
            headers=headers,
        ) as response:
            yield response

    def unreachable(self, error: httpx.TransportError) -> Exception:
        return self._calls.unreachable(error)


def wal_position(problem: ProblemError) -> WalPosition:
    """Where the service stands, as a `wal_gap` says it. Raises UnexpectedAnswer."""
    members: dict[str, Any] = dict(problem.extras)
    try:
        return msgspec.convert(members, type=WalPosition)
    except msgspec.ValidationError as error:
        raise UnexpectedAnswer(f"A wal_gap does not say where it is: {error}") from error
