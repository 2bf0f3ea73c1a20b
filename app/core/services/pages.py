"""Single pages of libsql databases."""

from dataclasses import dataclass
from hashlib import blake2b

from app.core.base.errors import PageNotFound
from app.core.reads.page_blobs import PageTier
from app.core.reads.page_store import PageStore
from app.core.services.states import States, StateSelector

_TAG_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundPage:
    data: bytes
    tier: PageTier
    generation: int
    lsn: int
    """Of the state it was read from."""

    @property
    def tag(self) -> str:
        """Names the content: the same page at another state may have the same."""
        return blake2b(self.data, digest_size=_TAG_BYTES).hexdigest()


class Pages:
    def __init__(self, states: States, store: PageStore) -> None:
        self._states = states
        self._store = store

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
