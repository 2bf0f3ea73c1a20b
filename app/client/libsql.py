"""SQLite databases: push their WAL, put an image. `images` reads one back.

Bodies come from files and are made anew for each attempt. Pushing WAL is not sent again by itself
when a connection fails: whoever follows a log asks the service where it stands, and goes on there.
"""

from collections.abc import Mapping
from typing import Any

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


def wal_position(problem: ProblemError) -> WalPosition:
    """Where the service stands, as a `wal_gap` says it. Raises UnexpectedAnswer."""
    members: dict[str, Any] = dict(problem.extras)
    try:
        return msgspec.convert(members, type=WalPosition)
    except msgspec.ValidationError as error:
        raise UnexpectedAnswer(f"A wal_gap does not say where it is: {error}") from error
