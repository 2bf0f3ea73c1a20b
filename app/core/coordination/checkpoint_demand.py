"""Which databases ask for a checkpoint, told by the WAL's side and taken by the trigger worker.

Loop-confined. Nothing here costs while nothing happens.
"""

import asyncio


class CheckpointDemand:
    def __init__(self) -> None:
        self._dirty: set[int] = set()
        self._pressed: set[int] = set()
        self._starved: set[str | None] = set()
        self._changed = asyncio.Event()

    def dirty(self, db_id: int) -> None:
        """It has unpublished WAL, and had none."""
        self._dirty.add(db_id)
        self._changed.set()

    def pressed(self, db_id: int) -> None:
        """Its unpublished WAL nears its share of the budget."""
        self._pressed.add(db_id)
        self._changed.set()

    def starved(self, tenant: str | None) -> None:
        """The quota refused an append: what frees WAL of the tenant, or of all, is wanted."""
        self._starved.add(tenant)
        self._changed.set()

    def take_dirty(self) -> set[int]:
        taken, self._dirty = self._dirty, set()
        return taken

    def take_pressed(self) -> set[int]:
        taken, self._pressed = self._pressed, set()
        return taken

    def take_starved(self) -> set[str | None]:
        taken, self._starved = self._starved, set()
        return taken

    async def wait(self) -> None:
        """Until something was told since the last wait."""
        await self._changed.wait()
        self._changed.clear()
