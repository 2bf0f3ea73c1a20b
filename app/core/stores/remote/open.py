"""Opens the remote store that a URL names, with its decorators."""

import re
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from app.core.base.clock import Clock, Randomness
from app.core.base.errors import StartRefused
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool
from app.core.stores.remote.directory import DirectoryRemoteStore
from app.core.stores.remote.keys import InvalidKey, check_key
from app.core.stores.remote.metered import Metered
from app.core.stores.remote.protocol import RemoteStore
from app.core.stores.remote.requests import ConcurrencyLimit, Retrier, RetryBudget, RetryPolicy
from app.core.stores.remote.retrying import Retrying
from app.core.stores.remote.s3 import S3RemoteStore
from app.core.stores.remote.s3_client import S3Options

THREADS = 8

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """The settings of the remote store, as values."""

    endpoint_url: str | None = None
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    ca_file: Path | None = None
    storage_class: str | None = None
    sse: Literal["AES256", "aws:kms"] | None = None
    sse_kms_key_id: str | None = None
    concurrency: int = 16
    attempts: int = 6
    connect_timeout_seconds: float = 5.0
    idle_timeout_seconds: float = 30.0
    request_timeout_seconds: float = 300.0
    retry_base_seconds: float = 0.1
    retry_cap_seconds: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Place:
    bucket: str
    prefix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryPlace:
    path: Path


def parse_remote_url(url: str) -> S3Place | DirectoryPlace:
    """Raises StartRefused for anything but `s3://bucket/prefix` and `file:///path`."""
    parts = urlsplit(url)
    if parts.query or parts.fragment or parts.username is not None:
        raise StartRefused("BOP_REMOTE_URL takes no query, fragment or credentials.")
    match parts.scheme:
        case "s3":
            prefix = parts.path.strip("/")
            if _BUCKET.fullmatch(parts.netloc) is None:
                raise StartRefused(f"{parts.netloc!r} in BOP_REMOTE_URL is no bucket's name.")
            try:
                if prefix:
                    check_key(prefix)
            except InvalidKey as error:
                raise StartRefused(f"{prefix!r} in BOP_REMOTE_URL is no usable prefix.") from error
            return S3Place(bucket=parts.netloc, prefix=prefix)
        case "file":
            path = Path(unquote(parts.path))
            if parts.netloc not in {"", "localhost"} or not path.is_absolute():
                raise StartRefused("BOP_REMOTE_URL with file:// needs an absolute path.")
            return DirectoryPlace(path=path)
        case _:
            raise StartRefused(
                f"BOP_REMOTE_URL begins with {parts.scheme!r}; it is s3://bucket/prefix or "
                "file:///path."
            )


async def open_remote(
    stack: AsyncExitStack,
    url: str,
    options: RemoteOptions,
    *,
    clock: Clock,
    randomness: Randomness,
    events: Events,
) -> Retrying:
    """Closed with the stack. Asks the store nothing: `probe` does. Raises StartRefused for a URL
    that cannot be one, RemoteUnavailable where a directory cannot be made.
    """
    place = parse_remote_url(url)
    pool = BlockingPool("bop-remote", threads=THREADS)
    stack.callback(pool.close_blocking)
    retrier = Retrier(
        RetryPolicy(
            attempts_max=options.attempts,
            backoff_base_seconds=options.retry_base_seconds,
            backoff_cap_seconds=options.retry_cap_seconds,
        ),
        budget=RetryBudget(),
        clock=clock,
        randomness=randomness,
        events=events,
    )
    store: RemoteStore
    match place:
        case DirectoryPlace(path=path):
            store = await DirectoryRemoteStore.open(path, pool=pool)
        case S3Place(bucket=bucket, prefix=prefix):
            store = await S3RemoteStore.open(
                _s3_options(options, bucket=bucket, prefix=prefix), retrier=retrier, pool=pool
            )
    stack.push_async_callback(store.aclose)
    return Retrying(
        Metered(store, clock=clock, events=events),
        retrier=retrier,
        limit=ConcurrencyLimit(ceiling=options.concurrency),
    )


def _s3_options(options: RemoteOptions, *, bucket: str, prefix: str) -> S3Options:
    return S3Options(
        bucket=bucket,
        prefix=prefix,
        endpoint_url=options.endpoint_url,
        region=options.region,
        addressing=options.addressing,
        ca_file=options.ca_file,
        storage_class=options.storage_class,
        sse=options.sse,
        sse_kms_key_id=options.sse_kms_key_id,
        concurrency=options.concurrency,
        connect_timeout_seconds=options.connect_timeout_seconds,
        idle_timeout_seconds=options.idle_timeout_seconds,
        request_timeout_seconds=options.request_timeout_seconds,
    )
