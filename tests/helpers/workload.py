"""What a client does to one append_only database, crash or no crash, and what must hold after.

Small chunks make every append roll segments; some appends carry an Idempotency-Key, one spans
several segments, and checkpoints run beside appends.
"""

import asyncio
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.helpers.ledger import AckLedger, Append, FinalRecord
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until

RECORDS = "application/vnd.bop.records"
CHUNK_BYTES = 65536
DATABASE = "/tenants/acme/databases/orders"
LARGE_COUNT = 80
"""Records of the one large append: 4 MB are several entries, each in a segment of its own."""
LARGE_ORDINAL = 6
"""The appends before it."""
DRAIN_SECONDS = 30.0
STANDARD_SETTINGS = {"BOP_HOT_CACHE_BYTES": str(2 * 1024 * 1024)}
"""With a hot cache so small that the workload makes it evict."""
_LENGTH = struct.Struct("<I")


class Crashed(Exception):
    """The service went away in mid-request."""


def frame(payloads: Sequence[bytes]) -> bytes:
    return b"".join(_LENGTH.pack(len(payload)) + payload for payload in payloads)


def unframe(body: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(body):
        (length,) = _LENGTH.unpack_from(body, at)
        at += _LENGTH.size
        assert at + length <= len(body), "a record is cut off"
        found.append(body[at : at + length])
        at += length
    return found


class Workload:
    """One client over the lives of a service; `run` may end in Crashed at any request."""

    def __init__(self, *, compression: str = "none", large_count: int = LARGE_COUNT) -> None:
        self._compression = compression
        self._large_count = large_count
        self.ledger = AckLedger()
        self.jobs: dict[str, int] = {}
        """Each checkpoint accepted, to the last LSN acknowledged before it was asked for."""
        self.created = False
        self._keys: dict[int, str] = {}

    async def run(self, client: httpx.AsyncClient) -> None:
        """About a second of work; may be run again on the same database."""
        await self.create(client)
        for number in range(LARGE_ORDINAL):
            await self.append(client, 3, pad_bytes=1500, keyed=number % 2 == 0)
        await self.append(client, self._large_count, pad_bytes=50_000, keyed=True)
        first = await self.trigger(client)
        await self._append_beside(client)
        await self.wait_job(client, first)
        await self.read_all(client)
        await self._append_beside(client)
        await self.wait_job(client, await self.trigger(client))
        await self.append(client, 2, pad_bytes=100)
        await self.read_all(client)

    async def _append_beside(self, client: httpx.AsyncClient) -> None:
        async def writer() -> None:
            for number in range(4):
                await self.append(client, 2, pad_bytes=3000, keyed=number == 1)

        outcomes = await asyncio.gather(*(writer() for _ in range(4)), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    # --- single requests

    async def create(self, client: httpx.AsyncClient) -> None:
        body = {
            "engine": "append_only",
            "chunk_bytes": CHUNK_BYTES,
            "compression": self._compression,
        }
        answer = await self._request(client, "PUT", DATABASE, json=body)
        if answer.status_code >= 500:
            raise Crashed(answer.text)
        assert answer.status_code in {200, 201}, answer.text
        self.created = True

    async def append(
        self, client: httpx.AsyncClient, count: int, *, pad_bytes: int, keyed: bool = False
    ) -> None:
        append = self.ledger.begin(count, pad_bytes=pad_bytes)
        if keyed:
            self._keys[append.ordinal] = f"append-{append.ordinal}"
        await self._send(client, append)

    async def retry_unknown(self, client: httpx.AsyncClient) -> int:
        """Sends again, under its key, each append whose answer was lost: it happens once."""
        again = [
            append
            for append in self.ledger.appends
            if append.outcome == "unknown" and append.ordinal in self._keys
        ]
        for append in again:
            await self._send(client, append)
            assert append.outcome == "ok"
        return len(again)

    async def _send(self, client: httpx.AsyncClient, append: Append) -> None:
        headers = {"Content-Type": RECORDS}
        if (key := self._keys.get(append.ordinal)) is not None:
            headers["Idempotency-Key"] = key
        try:
            answer = await self._request(
                client,
                "POST",
                f"{DATABASE}/records",
                content=frame(append.payloads),
                headers=headers,
            )
        except Crashed:
            append.unknown()
            raise
        if answer.status_code == 201:
            told = answer.json()
            append.ok(told["first_lsn"], told["last_lsn"])
            return
        if answer.status_code >= 500 and answer.status_code != 507:
            append.unknown()
            raise Crashed(answer.text)
        append.failed()
        raise AssertionError(f"append refused: {answer.status_code} {answer.text}")

    async def trigger(self, client: httpx.AsyncClient) -> str:
        covered = self.ledger.last_acknowledged_lsn
        body = {"tenant": "acme", "database": "orders"}
        answer = await self._request(client, "POST", "/checkpoints", json=body)
        if answer.status_code >= 500:
            raise Crashed(answer.text)
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        self.jobs[job_id] = covered
        return job_id

    async def wait_job(self, client: httpx.AsyncClient, job_id: str) -> None:
        job: dict[str, Any] = {"state": None}
        while job["state"] in {None, "pending", "in_flight"}:
            answer = await self._request(client, "GET", f"/checkpoints/{job_id}?wait=10")
            if answer.status_code >= 500:
                raise Crashed(answer.text)
            job = answer.json()
        assert job["state"] == "completed", job

    async def read_all(self, client: httpx.AsyncClient) -> list[FinalRecord]:
        """Every readable record, over gaps. None, where the database was never said to exist."""
        database = await self._request(client, "GET", DATABASE)
        if database.status_code == 404 and not self.created:
            return []
        if database.status_code != 200:
            raise Crashed(database.text)
        next_lsn, end = database.json()["first_lsn"], database.json()["next_lsn"]
        found: list[FinalRecord] = []
        while next_lsn < end:
            url = f"{DATABASE}/records?from_lsn={next_lsn}&to_lsn={end - 1}"
            answer = await self._request(client, "GET", url)
            assert answer.status_code == 200, answer.text
            records = unframe(answer.content)
            if records:
                first = int(answer.headers["Bop-First-Lsn"])
                found += enumerate(records, start=first)
                assert int(answer.headers["Bop-Last-Lsn"]) == found[-1][0]
            assert int(answer.headers["Bop-Next-Lsn"]) > next_lsn
            next_lsn = int(answer.headers["Bop-Next-Lsn"])
        return found

    async def _request(
        self, client: httpx.AsyncClient, method: str, url: str, **options: Any
    ) -> httpx.Response:
        try:
            return await client.request(method, url, **options)
        except httpx.TransportError as error:
            raise Crashed(f"{method} {url}: {error!r}") from error

    # --- what must hold once the service runs undisturbed

    async def check(self, server: ServerProcess) -> None:
        client = server.client
        await wait_until(lambda: _is_idle(client), timeout=DRAIN_SECONDS, describe="idle jobs")
        if (answer := await client.get(DATABASE)).status_code == 200:
            assert answer.json()["health"]["state"] == "ok", answer.text
        for job_id, covered in self.jobs.items():
            job = (await client.get(f"/checkpoints/{job_id}")).json()
            assert job["state"] == "completed", job
            assert answer.json()["checkpointed_lsn"] >= covered, (job, answer.text)
        assert await _items(client, "/debug/checkpoint/leases") == []
        quota = await client.get("/debug/storage/quota")
        if quota.status_code != 404:
            assert quota.json()["jobs"] == []
        assert scratch_left(server.data_dir) == []
        self.ledger.check(await self.read_all(client))


async def _is_idle(client: httpx.AsyncClient) -> bool:
    return not await _items(client, "/debug/checkpoint/active_jobs")


async def _items(client: httpx.AsyncClient, url: str) -> list[Any]:
    answer = await client.get(url)
    assert answer.status_code == 200, answer.text
    items: list[Any] = answer.json()["items"]
    return items


ORPHAN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"


def plant_orphan(data_dir: Path) -> None:
    """Scratch of a job that nobody knows, for the janitor to find when the service starts."""
    orphan = data_dir / "checkpoint_scratch" / ORPHAN
    orphan.mkdir(parents=True, exist_ok=True)
    (orphan / "chunk-0.blob").write_bytes(b"left behind")


def scratch_left(data_dir: Path) -> list[str]:
    scratch = data_dir / "checkpoint_scratch"
    return [str(path.relative_to(scratch)) for path in scratch.rglob("*")]
