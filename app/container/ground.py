"""What serve, recover and fsck all stand on: data directory, manifest, remote store, ownership."""

import asyncio
import fcntl
import os
import socket
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from app.core.base.clock import Clock, Randomness, SystemClock, SystemRandomness
from app.core.base.errors import StartRefused
from app.core.base.events import Events
from app.core.base.ids import new_ulid
from app.core.base.tasks import BlockingPool
from app.core.coordination.ownership import PrefixOwnership
from app.core.stores.local.scratch import ScratchStore
from app.core.stores.manifest.environment import fsync_path_blocking
from app.core.stores.manifest.store import ManifestStore
from app.core.stores.remote.open import RemoteOptions, open_remote
from app.core.stores.remote.retrying import Retrying
from app.settings import Settings
from migrations.runner import load_steps

OnFatal = Callable[[BaseException], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What serve, recover and fsck all stand on."""

    clock: Clock
    randomness: Randomness
    process_id: str
    manifest: ManifestStore
    remote: Retrying
    ownership: PrefixOwnership
    pool: BlockingPool
    scratch: ScratchStore


async def open_ground(
    stack: AsyncExitStack, settings: Settings, *, events: Events, on_fatal: OnFatal
) -> Ground:
    clock, randomness = SystemClock(), SystemRandomness()
    process_id = new_ulid(clock, randomness)
    try:
        await asyncio.to_thread(_make_data_directory_blocking, settings.data_dir)
        stack.enter_context(_DataDirectoryLock(settings.data_dir))
    except OSError as error:
        raise StartRefused(
            f"BOP_DATA_DIR={settings.data_dir} cannot be used: {error}. Name a directory that the "
            "service may write."
        ) from error
    manifest = await ManifestStore.open(
        settings.data_dir / "manifest",
        clock=clock,
        randomness=randomness,
        events=events,
        process_id=process_id,
        map_bytes=settings.manifest_map_bytes,
        gc_grace_seconds=settings.gc_grace_seconds,
        max_readers=settings.manifest_max_readers,
        migrations=load_steps(),
        on_fatal=on_fatal,
    )
    stack.push_async_callback(manifest.aclose)
    pool = BlockingPool("bop-io", threads=max(4, os.cpu_count() or 1))
    stack.callback(pool.close_blocking)
    remote = await open_remote(
        stack, settings.effective_remote_url, remote_options(settings),
        clock=clock, randomness=randomness, events=events,
    )  # fmt: skip
    ownership = PrefixOwnership(
        remote,
        node_id=manifest.node_id,
        process_id=process_id,
        host=socket.gethostname(),
        take_over=settings.take_over,
        clock=clock,
    )
    return Ground(
        clock=clock,
        randomness=randomness,
        process_id=process_id,
        manifest=manifest,
        remote=remote,
        ownership=ownership,
        pool=pool,
        scratch=ScratchStore(settings.data_dir / "checkpoint_scratch", pool=pool, clock=clock),
    )


def remote_options(settings: Settings) -> RemoteOptions:
    return RemoteOptions(
        endpoint_url=settings.s3_endpoint_url,
        region=settings.s3_region,
        addressing=settings.s3_addressing,
        ca_file=settings.s3_ca_file,
        storage_class=settings.s3_storage_class,
        sse=settings.s3_sse,
        sse_kms_key_id=settings.s3_sse_kms_key_id,
        concurrency=settings.remote_concurrency,
        attempts=settings.remote_attempts,
        connect_timeout_seconds=settings.remote_connect_timeout_seconds,
        idle_timeout_seconds=settings.remote_idle_timeout_seconds,
        request_timeout_seconds=settings.remote_request_timeout_seconds,
        retry_base_seconds=settings.remote_retry_base_seconds,
        retry_cap_seconds=settings.remote_retry_cap_seconds,
    )


def raise_fatal(error: BaseException) -> None:
    raise error


def _make_data_directory_blocking(path: Path) -> None:
    """Its name is durable on return: without that a power cut could take all that is in it (I1)."""
    made = [each for each in path.absolute().parents if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for each in (path.absolute(), *made):
        with suppress(PermissionError):  # a parent that we may not read, we have not made
            fsync_path_blocking(each.parent)


class _DataDirectoryLock:
    """One process per data directory (I17); the lock goes with the process."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "lock"
        self._fd = -1

    def __enter__(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise StartRefused(
                f"Another process uses the data directory {self._path.parent}."
            ) from error

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
