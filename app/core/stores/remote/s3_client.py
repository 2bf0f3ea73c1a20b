"""An S3 client of aiobotocore that does what it is told: one attempt, no silent waiting.

Known traps, each switched off here: `Expect: 100-continue` (a server that stays silent is waited
for past the read timeout), botocore's own retries (they do not know 429, nor our budget), aiohttp's
hidden second attempt on a reused connection, payload signing (a second pass over every byte; the
CRC-64/NVME header covers the body), and timeouts that do not cover a stalled upload.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aiobotocore.config import AioConfig
from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.session import get_session
from botocore.handlers import add_expect_header

_DEFAULT_REGION = "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Options:
    """Credentials are not among them: the SDK's own chain finds those."""

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    ca_file: Path | None = None
    storage_class: str | None = None
    sse: Literal["AES256", "aws:kms"] | None = None
    sse_kms_key_id: str | None = None
    concurrency: int = 16
    connect_timeout_seconds: float = 5.0
    idle_timeout_seconds: float = 30.0
    request_timeout_seconds: float = 300.0
    single_put_bytes_max: int = 1024 * 1024 * 1024
    part_bytes: int = 64 * 1024 * 1024
    list_page_count: int = 1000


class _SingleAttemptSession(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore has no types
    """aiohttp repeats an idempotent request by itself when a reused connection turns out closed;
    a conditional PUT repeated so would meet its own object as 412, unseen by our counters.
    """

    async def _get_session(self, proxy_url: str | None) -> Any:
        session = await super()._get_session(proxy_url)
        session._retry_connection = False  # noqa: SLF001 - there is no public switch
        return session


async def open_client(stack: AsyncExitStack, options: S3Options) -> Any:
    """The client is closed with the stack. Credentials come by the SDK's own chain, here."""
    session = get_session()
    region = options.region or session.get_config_variable("region")
    config = AioConfig(
        region_name=region or _DEFAULT_REGION,
        signature_version="s3v4",
        retries={"total_max_attempts": 1, "mode": "standard"},
        s3={"addressing_style": options.addressing, "payload_signing_enabled": False},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=options.connect_timeout_seconds,
        read_timeout=options.idle_timeout_seconds,
        max_pool_connections=2 * options.concurrency + 8,  # streams under way hold no slot
        http_session_cls=_SingleAttemptSession,
    )
    client = await stack.enter_async_context(
        session.create_client(
            "s3",
            endpoint_url=options.endpoint_url,
            verify=str(options.ca_file) if options.ca_file else None,
            config=config,
        )
    )
    client.meta.events.unregister("before-call.s3", add_expect_header)
    return client


@contextlib.asynccontextmanager
async def deadlines(
    *, idle_seconds: float, total_seconds: float
) -> AsyncIterator[Callable[[], None]]:
    """Raises TimeoutError when the block takes longer than `total_seconds` in all, or longer than
    `idle_seconds` since it began or since the yielded function was called last.
    """
    loop = asyncio.get_running_loop()
    inside = True
    async with asyncio.timeout(total_seconds), asyncio.timeout(idle_seconds) as idle:

        def progress() -> None:
            if inside and not idle.expired():
                idle.reschedule(loop.time() + idle_seconds)

        try:
            yield progress
        finally:
            inside = False
