"""Snapshots, forks and retention."""

from collections.abc import AsyncGenerator, Mapping

from app.client.calls import Calls, decoded, path_of
from app.client.databases import database_path
from app.client.wire import Database, Generation, Snapshot


class History:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def expiring(
        self, tenant: str, database: str, *, limit: int | None = None
    ) -> AsyncGenerator[Generation, None]:
        """The generations that the next collection takes, oldest first."""
        path = f"{database_path(tenant, database)}/generations"
        return self._calls.pages(path, Generation, params={"expiring": "true"}, limit=limit)

    async def set_retention(
        self, tenant: str, database: str, rules: Mapping[str, int | None]
    ) -> Database:
        """What `rules` leaves out stays as it is; None switches a rule off."""
        path = database_path(tenant, database)
        response = await self._calls.send(
            "PATCH", path, json={"retention": dict(rules)}, key=self._calls.new_key()
        )
        return decoded(response, Database)

    async def create_snapshot(
        self, tenant: str, database: str, name: str, *, generation: int | None = None
    ) -> Snapshot:
        """By default of the newest published generation."""
        response = await self._calls.send(
            "POST",
            f"{database_path(tenant, database)}/snapshots",
            json=_given(name=name, generation=generation),
            key=self._calls.new_key(),
        )
        return decoded(response, Snapshot)

    async def snapshot(self, tenant: str, database: str, name: str) -> Snapshot:
        path = f"{database_path(tenant, database)}/snapshots{path_of(name)}"
        return await self._calls.get(path, Snapshot)

    def snapshots(
        self, tenant: str, database: str, *, limit: int | None = None
    ) -> AsyncGenerator[Snapshot, None]:
        """By name."""
        path = f"{database_path(tenant, database)}/snapshots"
        return self._calls.pages(path, Snapshot, params={}, limit=limit)

    async def delete_snapshot(self, tenant: str, database: str, name: str) -> None:
        await self._calls.send(
            "DELETE", f"{database_path(tenant, database)}/snapshots{path_of(name)}"
        )

    async def fork(
        self,
        tenant: str,
        database: str,
        new_database: str,
        *,
        new_tenant: str | None = None,
        generation: int | None = None,
        snapshot: str | None = None,
    ) -> Database:
        """The new database; by default of the newest published generation."""
        response = await self._calls.send(
            "POST",
            f"{database_path(tenant, database)}/forks",
            json=_given(
                database=new_database, tenant=new_tenant, generation=generation, snapshot=snapshot
            ),
            key=self._calls.new_key(),
        )
        return decoded(response, Database)


def _given(**members: str | int | None) -> dict[str, str | int]:
    return {name: value for name, value in members.items() if value is not None}
