"""Whole libsql databases, as SQLite files, to be read."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from app.core.reads.image import iter_image
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import ReadPoint
from app.core.services.page_state import content_tag
from app.core.services.states import States, StateSelector


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A state, held until `release`, which may be said again."""

    point: ReadPoint
    store: PageStore

    @property
    def size_bytes(self) -> int:
        return self.point.size_bytes

    @property
    def generation(self) -> int:
        return self.point.generation

    @property
    def lsn(self) -> int:
        return self.point.lsn

    @property
    def tag(self) -> str:
        return content_tag(self.point.database.db_id, self.point.lsn)

    def content(self, first: int, stop: int) -> AsyncGenerator[memoryview, None]:
        """The bytes [first, stop), in pieces of at most 1 MiB. Raises CorruptBlob, CorruptWal,
        RemoteUnavailable.
        """
        return iter_image(self.store, self.point, first=first, stop=stop)

    def release(self) -> None:
        self.point.release()


class Images:
    def __init__(self, states: States, store: PageStore) -> None:
        self._states = states
        self._store = store

    async def open(self, tenant: str, name: str, selector: StateSelector) -> Image:
        """To be released by the caller. Raises what `States.open` does."""
        return Image(point=await self._states.open(tenant, name, selector), store=self._store)
