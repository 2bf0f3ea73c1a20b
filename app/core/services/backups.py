"""Online copies of the manifest, beside it, for the day it is damaged.

Invariants: a copy is whole and durable under its name, or not there; only the newest few are kept,
and the one just made is among them. Concurrency: one at a time; writers and readers go on.
Cancellation: a copy under way ends on its own. Crash: a partial one is removed by the next.
"""

import asyncio
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from app.core.base.clock import Clock
from app.core.base.events import Events
from app.core.stores.manifest.store import ManifestStore

_NAME = re.compile(r"\.?manifest-\d{8}T\d{6}Z-\d+(\.partial)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestBackup:
    path: Path
    bytes: int
    sequence: int
    """It holds at least all changes up to this one."""


class Backups:
    def __init__(
        self,
        manifest: ManifestStore,
        directory: Path,
        *,
        clock: Clock,
        events: Events,
        kept_count: int,
    ) -> None:
        self._manifest = manifest
        self._directory = directory
        self._clock = clock
        self._events = events
        self._kept_count = kept_count
        self._one_at_a_time = asyncio.Lock()

    async def make(self) -> ManifestBackup:
        """Raises DiskFull."""
        async with self._one_at_a_time:
            with self._manifest.read() as view:
                sequence = view.last_sequence()
            at = datetime.fromtimestamp(self._clock.wall_ns() // 1_000_000_000, tz=UTC)
            target = self._directory / f"manifest-{at:%Y%m%dT%H%M%SZ}-{sequence}"
            if target.exists():  # of this very second, and nothing has changed since
                size = await asyncio.to_thread(lambda: (target / "data.mdb").stat().st_size)
            else:
                size = (await self._manifest.backup(target)).bytes
            await asyncio.to_thread(self._forget_old_blocking, target)
        self._events.info("manifest.backed_up", path=str(target), bytes=size, sequence=sequence)
        return ManifestBackup(path=target, bytes=size, sequence=sequence)

    def _forget_old_blocking(self, newest: Path) -> None:
        """Only what was made here, by its name."""
        found = sorted(
            (path for path in self._directory.iterdir() if _NAME.fullmatch(path.name)),
            key=lambda path: path.name.lstrip("."),
        )
        whole = [path for path in found if not path.name.startswith(".")]
        for path in found:
            if path != newest and path not in whole[-self._kept_count :]:
                shutil.rmtree(path, ignore_errors=True)
