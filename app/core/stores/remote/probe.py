"""Asks the endpoint, once at the start, whether it can do what the invariants rest on.

Writes, re-writes on conditions, reads a range, asks for a checksum, lists and deletes under the
prefix, and says plainly what is lacking. What a crash leaves of it is swept with other orphans.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from app.core.base.clock import Randomness
from app.core.base.errors import BopError
from app.core.formats.crc64 import crc64
from app.core.stores.remote.keys import PROBE_PREFIX, probe_key
from app.core.stores.remote.protocol import (
    BytesBody,
    RemoteMisconfigured,
    RemoteStore,
)
from app.core.stores.remote.streams import closing


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    lacks: tuple[str, ...]
    """One sentence for each thing that the endpoint does not do as it must."""

    @property
    def complete(self) -> bool:
        return not self.lacks


async def probe(remote: RemoteStore, *, randomness: Randomness) -> ProbeReport:
    """A complete report. Raises RemoteMisconfigured naming all that is lacking, and
    RemoteUnavailable where the endpoint cannot be reached.
    """
    report = await inspect_endpoint(remote, randomness=randomness)
    if not report.complete:
        raise RemoteMisconfigured(
            "The endpoint cannot keep what this service promises. " + " ".join(report.lacks),
            lacks=list(report.lacks),
        )
    return report


async def inspect_endpoint(remote: RemoteStore, *, randomness: Randomness) -> ProbeReport:
    """Raises RemoteUnavailable (RemoteMisconfigured for credentials and the like)."""
    drawn = f"{randomness.bits(80):020x}"
    lacks: list[str] = []
    key, absent = probe_key(probe=drawn, name="object"), probe_key(probe=drawn, name="absent")
    async with _removed(remote, key, absent):
        await _inspect_writes(remote, key, absent, lacks)
        await _inspect_reads(remote, key, f"{PROBE_PREFIX}{drawn}/", lacks)
    if lacks:
        return ProbeReport(lacks=tuple(lacks))
    if await remote.head_blob(key) is not None:
        lacks.append("A deleted object is still there.")
    return ProbeReport(lacks=tuple(lacks))


async def _inspect_writes(remote: RemoteStore, key: str, absent: str, lacks: list[str]) -> None:
    first = await remote.put_if_absent(key, _body(b"first"))
    if first is None:
        lacks.append("If-None-Match refuses a key that is not there.")
        return
    if await remote.put_if_absent(key, _body(b"second")) is not None:
        lacks.append("If-None-Match on PUT is ignored: two owners could not be told apart.")
    if await remote.put_if_match(key, _body(b"third"), etag='"00000000000000000000"') is not None:
        lacks.append("If-Match on PUT is ignored: a stale owner could overwrite a newer one.")
    if await remote.put_if_match(absent, _body(b"none"), etag=first.etag) is not None:
        lacks.append("If-Match on PUT creates an absent object.")
    current = await remote.head_blob(key)
    if current is None or await remote.put_if_match(key, FINAL, etag=current.etag) is None:
        lacks.append("If-Match on PUT refuses the object's own ETag.")
        await remote.put_blob(key, FINAL)


async def _inspect_reads(remote: RemoteStore, key: str, prefix: str, lacks: list[str]) -> None:
    found = await remote.head_blob(key)
    if found is None:
        lacks.append("An object just written is not there.")
        return
    if found.crc64 is None:
        lacks.append("HEAD names no CRC-64/NVME: uploads cannot be confirmed.")
    elif (found.crc64, found.bytes) != (FINAL.crc64, FINAL.bytes):
        lacks.append("HEAD names another checksum or length than was written.")
    try:
        if await remote.get_blob(key, first=4, length=6) != FINAL.data[4:10]:
            lacks.append("A ranged GET gives other bytes than the range's.")
    except RemoteMisconfigured as error:
        lacks.append(error.detail)
    async with closing(remote.list_blobs(prefix)) as listing:
        names = [info.key async for info in listing]
    if names != [key]:
        lacks.append("A listing does not show exactly what was written.")


@contextlib.asynccontextmanager
async def _removed(remote: RemoteStore, *keys: str) -> AsyncIterator[None]:
    """What the probe wrote goes, also when it fails; then on a best effort."""
    try:
        yield
    except BopError:
        with contextlib.suppress(BopError):
            await remote.delete_blobs(keys)
        raise
    if failed := await remote.delete_blobs(keys):
        raise RemoteMisconfigured(
            "The endpoint does not delete; the credentials may lack s3:DeleteObject.",
            keys=list(failed),
        )


def _body(data: bytes) -> BytesBody:
    return BytesBody(data=data, crc64=crc64(data))


FINAL = _body(b"the probe's last content")
