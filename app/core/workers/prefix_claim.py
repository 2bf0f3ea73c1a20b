"""Claims the remote prefix, however long the remote store takes to answer (I17).

Until then the WAL is taken, jobs wait, and readiness says why. A prefix that belongs to someone
else, or holds databases or generations that this data directory does not know, ends the process in
order.
"""

import asyncio

from app.core.base.clock import Clock, Randomness, full_jitter
from app.core.base.errors import BopError, NotReady, StartRefused
from app.core.base.events import Events
from app.core.coordination.ownership import PrefixOwnership
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.keys import DOCUMENTS_PREFIX
from app.core.stores.remote.probe import probe
from app.core.stores.remote.protocol import RemoteStore
from app.core.stores.remote.streams import closing
from app.core.workers.older_copy import refuse_older_copy


class PrefixClaim:
    name = "prefix_claim"

    def __init__(
        self,
        *,
        remote: RemoteStore,
        ownership: PrefixOwnership,
        manifest: ManifestStore,
        clock: Clock,
        randomness: Randomness,
        events: Events,
        fresh: bool,
    ) -> None:
        """`fresh`: this data directory held no database when it was opened."""
        self._fresh = fresh
        self._remote = remote
        self._ownership = ownership
        self._manifest = manifest
        self._clock = clock
        self._randomness = randomness
        self._events = events
        self._claimed = asyncio.Event()
        self.problem: str | None = "the remote prefix is not claimed yet"

    @property
    def claimed(self) -> bool:
        return self._claimed.is_set()

    def remote(self) -> RemoteStore:
        """The store, once the prefix is ours. Raises NotReady."""
        if not self.claimed:
            raise NotReady("The remote prefix is not claimed yet.", retry_after_seconds=2)
        return self._remote

    async def wait_claimed(self) -> None:
        await self._claimed.wait()

    async def attempt(self) -> bool:
        """One try. False if the store does not answer as it should; raises OwnershipLost or
        StartRefused where the prefix is not ours to take.
        """
        try:
            await probe(self._remote, randomness=self._randomness)
            await self._refuse_second_history()
            await refuse_older_copy(self._manifest, self._remote)
            epoch = await self._ownership.claim()
        except BopError as error:
            self.problem = f"remote store: {error.detail}"
            self._events.warning("prefix.unclaimed", code=error.code, detail=str(error))
            return False
        self._manifest.set_epoch(epoch)
        self.problem = None
        self._claimed.set()
        self._events.info("prefix.claimed", epoch=epoch)
        return True

    async def _refuse_second_history(self) -> None:
        if not self._fresh:
            return
        async with closing(self._remote.list_blobs(DOCUMENTS_PREFIX)) as found:
            async for _ in found:
                raise StartRefused(
                    "The data directory is empty, but the remote prefix holds databases. Restore "
                    "them with 'bop-checkpoint recover', or choose another prefix with "
                    "BOP_REMOTE_URL."
                )

    async def run(self) -> None:
        attempt = 0
        while not self.claimed:
            attempt += 1
            if await self.attempt():
                break
            await self._clock.sleep(
                full_jitter(self._randomness, attempt=attempt, base_seconds=0.5, cap_seconds=10.0)
            )
        await asyncio.get_running_loop().create_future()  # claimed for good; stays until cancelled
