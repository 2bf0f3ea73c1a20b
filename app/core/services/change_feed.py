"""The change feed: named cursors over the change log, each belonging to its principal.

A read begins behind what the cursor has acknowledged and moves nothing; acknowledging does, so
that a subscriber that dies is given again what it had not finished. Changes that the principal may
not see are passed over, and the cursor with them, so that they never hold the log's trimming up.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

from app.core.base.errors import CursorExpired, CursorNotFound
from app.core.stores.manifest.ops import AckCursor, DeleteCursor, ManifestBatch, Op, PutCursor
from app.core.stores.manifest.records import ChangeRecord, CursorRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView

READ_AT_ONCE = 1000

Start = int | Literal["start", "now"]
Sees = Callable[[str], bool]
"""Whether the principal may see a tenant's changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CursorStatus:
    record: CursorRecord
    first_sequence: int
    """The oldest change that is retained."""
    last_sequence: int

    @property
    def expired(self) -> bool:
        return self.record.acknowledged < self.first_sequence - 1


class ChangeFeed:
    def __init__(self, manifest: ManifestStore) -> None:
        self._manifest = manifest
        self._followers: set[asyncio.Future[None]] = set()

    async def put(self, principal: str, name: str, start: Start) -> tuple[CursorStatus, bool]:
        """The cursor, set to `start`, and whether it is new. Raises CursorExpired,
        InvalidRequest.
        """
        record, is_new = await self._commit(
            PutCursor(principal=principal, name=name, start=start), reason="cursor.put"
        )
        self._wake_followers()
        return self._status(record), is_new

    def get(self, principal: str, name: str) -> CursorStatus:
        """Raises CursorNotFound."""
        with self._manifest.read() as view:
            record = view.cursor(principal, name)
        if record is None:
            raise _not_found(name)
        return self._status(record)

    def cursors(self, principal: str, *, limit: int, after: str | None) -> list[CursorStatus]:
        """In the order of their names, from the one behind `after`."""
        with self._manifest.read() as view:
            records = view.cursors(principal)
        wanted = [record for record in records if after is None or record.name > after]
        return [self._status(record) for record in wanted[:limit]]

    async def ack(self, principal: str, name: str, sequence: int) -> CursorStatus:
        """All up to `sequence` is done with. Raises CursorNotFound, CursorExpired,
        InvalidRequest.
        """
        op = AckCursor(principal=principal, name=name, sequence=sequence)
        return self._status(await self._commit(op, reason="cursor.acknowledged"))

    async def delete(self, principal: str, name: str) -> None:
        """Raises CursorNotFound."""
        await self._commit(DeleteCursor(principal=principal, name=name), reason="cursor.deleted")
        self._wake_followers()

    async def read(
        self, principal: str, name: str, *, limit: int, after: int | None, sees: Sees
    ) -> list[ChangeRecord]:
        """Up to `limit` changes that may be seen, oldest first: those behind `after`, or behind
        what the cursor has acknowledged. Raises CursorNotFound, CursorExpired.
        """
        found: list[ChangeRecord] = []
        acknowledged = self.get(principal, name).record.acknowledged
        position = acknowledged if after is None else max(after, acknowledged)
        # All that was given has been acknowledged: what may not be seen next need not wait.
        may_skip = position == acknowledged
        hidden_count = 0
        while True:
            changes = await self._load(name, position)
            for change in changes:
                position = change.sequence
                if not sees(change.tenant):
                    hidden_count += not found
                    continue
                if not found and hidden_count >= READ_AT_ONCE and may_skip:
                    await self.ack(principal, name, position - 1)
                found.append(change)
                if len(found) == limit:
                    return found
            if len(changes) < READ_AT_ONCE:
                if not found and hidden_count >= READ_AT_ONCE and may_skip:
                    await self.ack(principal, name, position)
                return found

    async def follow(
        self, principal: str, name: str, *, after: int | None, sees: Sees
    ) -> AsyncIterator[ChangeRecord]:
        """Changes as they are committed, without an end. Raises as `read`, also when the cursor
        is deleted or left behind meanwhile.
        """
        position = after
        while True:
            changed = self._manifest.next_change()
            touched = asyncio.get_running_loop().create_future()
            self._followers.add(touched)
            try:
                changes = await self.read(
                    principal, name, limit=READ_AT_ONCE, after=position, sees=sees
                )
                for change in changes:
                    yield change
                    position = change.sequence
                if not changes:
                    await asyncio.wait({changed, touched}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                changed.cancel()
                self._followers.discard(touched)

    def _wake_followers(self) -> None:
        """A cursor is gone, or another: no change of the log tells those who follow it."""
        for follower in self._followers:
            if not follower.done():
                follower.set_result(None)

    async def _load(self, name: str, position: int) -> list[ChangeRecord]:
        def load(view: ManifestView) -> list[ChangeRecord]:
            if position < view.trimmed_through():
                raise CursorExpired(cursor=name, first_sequence=view.trimmed_through() + 1)
            return view.change_log(after_sequence=position, limit=READ_AT_ONCE)

        return await self._manifest.read_in_thread(load)

    async def _commit(self, op: Op, *, reason: str) -> Any:
        receipt = await self._manifest.commit(ManifestBatch(ops=(op,), reason=reason))
        return receipt.results[0]

    def _status(self, record: CursorRecord) -> CursorStatus:
        with self._manifest.read() as view:
            return CursorStatus(
                record=record,
                first_sequence=view.trimmed_through() + 1,
                last_sequence=view.last_sequence(),
            )


def _not_found(name: str) -> CursorNotFound:
    return CursorNotFound(f"There is no cursor {name}.", cursor=name)
