"""Databases: create, look, list, wait for durability, accept a loss."""

from collections.abc import AsyncGenerator

from app.client.calls import Calls, decoded, path_of
from app.client.wire import Codec, Database, Durability, Engine, Generation


class Databases:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def create(
        self,
        tenant: str,
        database: str,
        *,
        engine: Engine,
        page_size: int | None = None,
        chunk_bytes: int | None = None,
        compression: Codec | None = None,
    ) -> tuple[Database, bool]:
        """The database, and whether it is new: the same again gives the one that is there."""
        asked = {
            "engine": engine,
            "page_size": page_size,
            "chunk_bytes": chunk_bytes,
            "compression": compression,
        }
        response = await self._calls.send(
            "PUT",
            database_path(tenant, database),
            json={name: value for name, value in asked.items() if value is not None},
        )
        return decoded(response, Database), response.status_code == 201

    async def get(self, tenant: str, database: str) -> Database:
        return await self._calls.get(database_path(tenant, database), Database)

    def list(self, tenant: str, *, limit: int | None = None) -> AsyncGenerator[Database, None]:
        """By name."""
        return self._calls.pages(
            path_of("tenants", tenant, "databases"), Database, params={}, limit=limit
        )

    def generations(
        self, tenant: str, database: str, *, limit: int | None = None
    ) -> AsyncGenerator[Generation, None]:
        """Oldest first."""
        path = f"{database_path(tenant, database)}/generations"
        return self._calls.pages(path, Generation, params={}, limit=limit)

    async def durable(
        self, tenant: str, database: str, *, min_lsn: int, wait_seconds: float = 0.0
    ) -> Durability:
        """As soon as a checkpoint covers `min_lsn`, or when the time is over. Forces nothing."""
        return await self._calls.get(
            f"{database_path(tenant, database)}/durable",
            Durability,
            params={"min_lsn": min_lsn},
            wait_seconds=wait_seconds,
        )

    async def acknowledge_loss(self, tenant: str, database: str) -> Database:
        """Lets a database whose unpublished WAL was lost take writes again."""
        response = await self._calls.send(
            "POST",
            f"{database_path(tenant, database)}/acknowledge-loss",
            key=self._calls.new_key(),
        )
        return decoded(response, Database)


def database_path(tenant: str, database: str) -> str:
    return path_of("tenants", tenant, "databases", database)
