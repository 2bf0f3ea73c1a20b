"""Single pages of libsql databases."""

from dataclasses import dataclass

from app.core.base.errors import PageNotFound
from app.core.formats.page_codec import page_digest
from app.core.reads.page_blobs import PageTier
from app.core.reads.page_store import PageStore
from app.core.services.directory import DatabaseDirectory
from app.core.services.states import States, StateSelector


@dataclass(slots=True)
class FoundPage:
    data: bytes
    tier: PageTier
    generation: int
    lsn: int
    """Of the state it was read from."""

    @property
    def tag(self) -> str:
        """Names the content: the same page at another state may have the same."""
        return page_digest(self.data).hex()


class Pages:
    def __init__(self, states: States, directory: DatabaseDirectory, store: PageStore) -> None:
        self._states = states
        self._directory = directory
        self._store = store

    def get(self, tenant: str, name: str, page_no: int) -> FoundPage | None:
        """The page at the newest state, if it is in memory: the short way of most reads. None says
        nothing: ask `read`. Raises DatabaseNotFound, WrongEngine.
        """
        database, _ = self._directory.require(tenant, name, "libsql")
        page = self._store.get_page(database.db_id, page_no)
        if page is None:
            return None
        return FoundPage(
            data=page.data, tier="page_cache", generation=page.generation, lsn=page.lsn
        )

    async def read(
        self, tenant: str, name: str, page_no: int, selector: StateSelector
    ) -> FoundPage:
        """Pages count from 1. Raises PageNotFound, and what `States.open` and
        `PageStore.read_page` do.
        """
        with await self._states.open(tenant, name, selector) as point:
            if not 1 <= page_no <= point.page_count:
                raise PageNotFound(
                    f"{tenant}/{name} has {point.page_count} pages there.",
                    page_no=page_no,
                    page_count=point.page_count,
                )
            page = await self._store.read_page(point, page_no)
            return FoundPage(
                data=page.data, tier=page.tier, generation=page.generation, lsn=point.lsn
            )
