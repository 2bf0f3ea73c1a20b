"""The last life: the bucket and the disk are well, nobody asks any more, and all that was begun
must come to its end and nothing be left that nobody needs. Then, in some seeds, the disk is lost,
and the bucket alone must bring everything back.
"""

import asyncio

from app.container.service import Container
from app.core.base.errors import NoGeneration, Unavailable
from app.core.stores.remote.keys import CHECKPOINTS_PREFIX, DOCUMENTS_PREFIX, SNAPSHOTS_PREFIX
from app.core.workers.collector import RoundRequest
from tests.simulation.bucket import Violation
from tests.simulation.content import Database, Ledger, read_content
from tests.simulation.crowd import Crowd
from tests.simulation.life import Life
from tests.simulation.painters import Painter
from tests.simulation.writers import Writer

DRAIN_SECONDS = 6 * 3600.0
ORPHAN_AGE_SECONDS = 7200
GRACE_SECONDS = 600
COLLECTIONS_MAX = 20
PREFIXES = (CHECKPOINTS_PREFIX, DOCUMENTS_PREFIX, SNAPSHOTS_PREFIX)
"""Where nothing may be left. A probe that a kill cut short leaves its few bytes."""


async def drain(container: Container, *, crowd: Crowd, life: Life) -> None:
    await _no_jobs(container)
    await _settle(container, crowd)
    for database in crowd.databases:
        await _checkpoint(container, database)
        await _verify(container, database)
        database.check(await read_content(container, database, database.name))
    await _check_history(container, crowd)
    await _nothing_left(container, crowd, life)


async def recovered(container: Container, *, crowd: Crowd, life: Life) -> None:
    """Every record and page, fork and snapshot is there again, LSNs go on behind all that were
    given out, and so does the work. Of a database that never held anything the bucket knows not.
    """
    crowd.ledgers = [
        one for one in crowd.ledgers if one.history
    ]  # the others are not in the bucket
    crowd.pictures = [one for one in crowd.pictures if one.images != [b""]]
    for database in crowd.databases:
        if isinstance(database, Ledger):
            status = container.services.databases.get(database.tenant, database.name)
            if status.next_lsn < database.next_lsn:
                raise Violation(f"{database.name} goes on at {status.next_lsn} after its recovery")
            database.next_lsn = status.next_lsn
        database.check(await read_content(container, database, database.name))
    await _check_history(container, crowd)
    for ledger in crowd.ledgers:
        await Writer(crowd, container, ledger).append()
    for picture in crowd.pictures:
        painter = Painter(crowd, container, picture)
        await painter.settle()
        await painter.put_image()
    for database in crowd.databases:
        await _checkpoint(container, database)
        await _verify(container, database)
        database.check(await read_content(container, database, database.name))
    await _nothing_left(container, crowd, life)
    crowd.done["recovered"] += 1


async def _settle(container: Container, crowd: Crowd) -> None:
    for ledger in crowd.ledgers:
        await Writer(crowd, container, ledger).settle()
    for picture in crowd.pictures:
        await Painter(crowd, container, picture).settle()


async def _checkpoint(container: Container, database: Database) -> None:
    services = container.services
    job = await services.checkpoints.trigger(
        database.tenant, database.name, reason=None, principal="end"
    )
    job = await services.jobs.wait(job.job_id, seconds=DRAIN_SECONDS)
    if job.state != "completed":
        raise Violation(f"the last checkpoint of {database.name} is {job.state}: {job.error}")


async def _verify(container: Container, database: Database) -> None:
    """All of its blobs are what they should be, whatever had rotted before."""
    services = container.services
    try:
        job = await services.generation_jobs.request(
            "verify_manifest", database.tenant, database.name, generation=None, principal="end"
        )
    except NoGeneration:
        return
    job = await services.jobs.wait(job.job_id, seconds=DRAIN_SECONDS)
    if job.state != "completed" or (job.result or {}).get("repaired_blobs"):
        raise Violation(f"{database.name} is not well at the end: {job.error} {job.result}")


async def _check_history(container: Container, crowd: Crowd) -> None:
    for name, (parent, before) in sorted(crowd.forks.items()):
        if await read_content(container, parent, name) != before:
            raise Violation(f"the fork {name} of {parent.name} reads otherwise than at first")
    by_name = {(one.tenant, one.name): one for one in crowd.databases}
    for tenant, name, snapshot in sorted(crowd.snapshots):
        fork = crowd.new_name("of-snapshot-")
        await container.services.forks.create(
            tenant, name, fork_tenant=tenant, fork_database=fork, snapshot=snapshot
        )
        parent = by_name[tenant, name]
        parent.check_past(await read_content(container, parent, fork))
        await container.services.deletion.delete(
            tenant, fork, with_snapshots=False, principal="end"
        )


async def _no_jobs(container: Container) -> None:
    give_up_at = asyncio.get_running_loop().time() + DRAIN_SECONDS
    while jobs := container.services.debugging.active_jobs(limit=10, after=None):
        if asyncio.get_running_loop().time() > give_up_at:
            break
        await asyncio.sleep(30)
    else:
        return
    raise Violation(f"jobs never end: {jobs}")


async def _nothing_left(container: Container, crowd: Crowd, life: Life) -> None:
    services = container.services
    await asyncio.sleep(ORPHAN_AGE_SECONDS + 3600)
    for orphans in ("delete", None, None):
        try:
            await services.collection.run(
                RoundRequest(everything=True, accept_clock=True, orphans=orphans)
            )
        except Unavailable as error:
            raise Violation("collection fails though the bucket is well") from error
        await asyncio.sleep(ORPHAN_AGE_SECONDS + GRACE_SECONDS + 600)
    await _no_jobs(container)
    if leases := services.debugging.leases(limit=10, after=None):
        raise Violation(f"leases are left: {leases}")
    if (quota := services.debugging.quota()).jobs or quota.drain_used_bytes:
        raise Violation(f"reservations are left: {quota}")
    if left := sorted((life.data_dir / "checkpoint_scratch").rglob("*")):
        raise Violation(f"scratch is left: {left}")
    report = await services.debugging.fsck()
    if not report.clean:
        raise Violation(f"fsck: {report.findings[:10]}")
    unknown = _unneeded(crowd, life)
    for _ in range(COLLECTIONS_MAX):
        if not unknown:
            return
        await asyncio.sleep(2 * GRACE_SECONDS)  # what has just expired by its age is on its way
        await services.collection.run(RoundRequest(everything=True, accept_clock=True))
        unknown = _unneeded(crowd, life)
    raise Violation(f"{len(unknown)} objects are left that nobody needs: {unknown[:5]}")


def _unneeded(crowd: Crowd, life: Life) -> list[str]:
    assert life.manifest is not None
    with life.manifest.read() as view:
        known = {row.document_key for database in view.all_databases()
                 for row in view.generations(database.db_id)}  # fmt: skip
        known |= {row.document.key for row in view.all_snapshots() if row.document is not None}
        return [
            key
            for key in crowd.bucket.objects
            if not view.blob_references(key) and key not in known and key.startswith(PREFIXES)
        ]
