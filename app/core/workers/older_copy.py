"""Whether this data directory is an older copy of one that has published since (I14, I17).

A generation is in the manifest, durably, before its document is in the bucket. So a document above
a database's newest generation was published by a life that this directory knows nothing of: LSNs
that it would give out are given out already.
"""

from collections.abc import Sequence

from app.core.base.errors import StartRefused
from app.core.base.tasks import for_each
from app.core.stores.manifest.records import DatabaseRecord
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.manifest.view import ManifestView
from app.core.stores.remote.keys import GenerationDocumentKey, documents_prefix, parse_key
from app.core.stores.remote.protocol import RemoteStore
from app.core.stores.remote.streams import closing

LOOKED_UP_MAX = 1000
"""A start asks for as many listings at most, of those that changed last: one that was published
since is enough, and with these it is likeliest.
"""
AT_ONCE = 16


async def refuse_older_copy(manifest: ManifestStore, remote: RemoteStore) -> None:
    """Raises StartRefused, and what listing raises."""

    async def look(database: DatabaseRecord) -> None:
        newest = await _newest_document(remote, database)
        if newest > database.generation:
            raise StartRefused(
                f"The data directory is older than the remote prefix: {database.tenant}/"
                f"{database.name} is at generation {database.generation} here, and was published "
                f"up to generation {newest}. Put the newest copy back, or move this one away and "
                "restore what was published with 'bop-checkpoint recover'."
            )

    await for_each(await manifest.read_in_thread(latest_first), look, limit=AT_ONCE)


def latest_first(view: ManifestView) -> Sequence[DatabaseRecord]:
    """The databases to look at."""

    def changed_at_us(database: DatabaseRecord) -> int:
        newest = view.latest_generation(database.db_id)
        return database.created_at_us if newest is None else newest.committed_at_us

    known = [one for one in view.all_databases() if one.state != "tombstoned"]
    return sorted(known, key=changed_at_us, reverse=True)[:LOOKED_UP_MAX]


async def _newest_document(remote: RemoteStore, database: DatabaseRecord) -> int:
    prefix = documents_prefix(tenant=database.tenant, database=database.name, db_id=database.db_id)
    newest = 0
    async with closing(remote.list_blobs(prefix)) as found:
        async for info in found:
            match parse_key(info.key):
                case GenerationDocumentKey(generation=generation):
                    newest = max(newest, generation)
                case _:
                    pass
    return newest
