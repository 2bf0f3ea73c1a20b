"""What runs without a service: rebuilding a manifest, checking a data directory."""

from collections.abc import Callable
from contextlib import AsyncExitStack

from app.container.ground import open_ground, raise_fatal
from app.core.base.events import Events
from app.core.services.fsck import Fsck, FsckReport
from app.core.services.recovery import RecoverReport, recover_databases
from app.settings import Settings


def _no_progress(read: int, total: int) -> None:
    del read, total


async def recover(
    settings: Settings, *, progress: Callable[[int, int], None] = _no_progress
) -> RecoverReport:
    """Rebuilds the manifest of an empty data directory from the bucket, and takes the prefix
    over for this directory's node identity. Raises StartRefused, RemoteUnavailable.
    """
    events = Events()
    async with AsyncExitStack() as stack:
        ground = await open_ground(
            stack,
            settings.model_copy(update={"take_over": True}),
            events=events,
            on_fatal=raise_fatal,
        )
        report = await recover_databases(
            ground.manifest, ground.remote, events=events, progress=progress
        )
        await ground.ownership.claim()
        return report


async def fsck(settings: Settings) -> FsckReport:
    """Checks a stopped service's data directory. Raises StartRefused while one runs on it."""
    async with AsyncExitStack() as stack:
        ground = await open_ground(stack, settings, events=Events(), on_fatal=raise_fatal)
        return await Fsck(
            manifest=ground.manifest,
            remote=lambda: ground.remote,
            wal_root=settings.data_dir / "wal",
            scratch=ground.scratch,
            quota=None,
            pool=ground.pool,
        ).run()
