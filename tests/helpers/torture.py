"""Clients that use a service at random while it is killed, and what must hold after each kill.

Three databases: a log with many appenders at once, whose history must be linearizable; a libsql
database that one client replaces by images; and a log whose checkpoints, truncations, snapshots,
forks and collections run beside both. The clients share one process, so their
moments have an order.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

import httpx

from tests.helpers.linearizability import Attempt, Told, check_history
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS, Crashed, frame, unframe

TENANT = "/tenants/acme/databases"
LOG, APP, BUSY = f"{TENANT}/log", f"{TENANT}/app", f"{TENANT}/busy"
CHUNK_BYTES, PAGE = 65_536, 512
APPENDERS = 5
IDLE_SECONDS = 60.0

SETTINGS = {
    "BOP_HOT_CACHE_BYTES": str(1024 * 1024),
    "BOP_GC_GRACE_SECONDS": "1",
    "BOP_GC_INTERVAL_SECONDS": "0.3",
    "BOP_LEASE_TTL_SECONDS": "5",
    "BOP_LOG_LEVEL": "warning",
}


class Torture:
    def __init__(self, seed: int) -> None:
        self.source = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.attempts: list[Attempt] = []
        self.told: list[Told] = []
        self._moments = itertools.count(1)
        self._retries: list[tuple[Attempt, str]] = []
        self._images: list[bytes] = [b""]  # one was never put: the file is empty
        """What the libsql database may hold: one, or two where an answer was lost."""
        self._names = itertools.count()
        self._snapshots: set[str] = set()
        self._forks: set[str] = set()

    # --- a life

    async def work(self, client: httpx.AsyncClient) -> None:
        """For ever; ends when the service is gone."""
        clients = [
            *(self._append(client) for _ in range(APPENDERS)),
            self._replace(client),
            self._keep_busy(client),
            self._meddle(client),
        ]
        tasks = [asyncio.ensure_future(one) for one in clients]
        try:
            await asyncio.gather(*tasks)
        except Crashed:
            pass
        finally:
            await asyncio.wait(tasks)
        errors = [task.exception() for task in tasks if not task.cancelled()]
        for error in errors:
            if error is not None and not isinstance(error, Crashed):
                raise error

    async def create(self, client: httpx.AsyncClient) -> None:
        for path, codec in ((LOG, "zstd"), (BUSY, "none")):
            body: dict[str, Any] = {"engine": "append_only", "chunk_bytes": CHUNK_BYTES}
            await self._ask(client, "PUT", path, json={**body, "compression": codec})
        body = {"engine": "libsql", "chunk_bytes": CHUNK_BYTES, "page_size": PAGE}
        await self._ask(client, "PUT", APP, json=body)

    # --- clients

    async def _append(self, client: httpx.AsyncClient) -> None:
        """With `If-Match` and without, with a key and without; some appends are retries."""
        known: int | None = None
        while True:
            retry = self._retries.pop() if self._retries else None
            if retry is not None:
                attempt, key = retry
                attempt.ended, attempt.outcome = inf, "unknown"
            else:
                attempt = self._new_attempt(known if self.source.random() < 0.6 else None)
                key = f"k{id(attempt)}" if attempt.expected is None else ""
            known = await self._send(client, attempt, key)
            if self.source.random() < 0.1:
                known = await self._look(client)

    def _new_attempt(self, expected: int | None) -> Attempt:
        number = next(self._names)
        payloads = tuple(
            f"{number}.{each}.".encode() + b"x" * self.source.choice([0, 0, 800, 20_000])
            for each in range(self.source.choice([1, 1, 3, 8]))
        )
        attempt = Attempt(payloads=payloads, began=next(self._moments), expected=expected)
        self.attempts.append(attempt)
        return attempt

    async def _send(self, client: httpx.AsyncClient, attempt: Attempt, key: str) -> int | None:
        """The `next_lsn` that is known then."""
        headers = {"Content-Type": RECORDS}
        if key:
            headers["Idempotency-Key"] = key
        if attempt.expected is not None:
            headers["If-Match"] = f'"{attempt.expected}"'
        began = next(self._moments)
        try:
            answer = await self._ask(
                client, "POST", f"{LOG}/records", content=frame(attempt.payloads), headers=headers
            )
        except Crashed:
            if key:
                self._retries.append((attempt, key))
            raise
        attempt.ended = next(self._moments)
        if answer.status_code == 201:
            attempt.outcome, attempt.first_lsn = "ok", answer.json()["first_lsn"]
            self.done["append"] += 1
            return int(answer.json()["last_lsn"]) + 1
        attempt.outcome = "refused"
        if answer.status_code == 412:
            told = Told(began=began, ended=attempt.ended, next_lsn=answer.json()["next_lsn"])
            assert told.next_lsn != attempt.expected, answer.text
            self.told.append(told)
            self.done["mismatch"] += 1
            return told.next_lsn
        assert answer.status_code == 429, answer.text
        return None

    async def _look(self, client: httpx.AsyncClient) -> int:
        began = next(self._moments)
        answer = await self._ask(client, "GET", LOG)
        self.told.append(
            Told(began=began, ended=next(self._moments), next_lsn=answer.json()["next_lsn"])
        )
        return self.told[-1].next_lsn

    async def _replace(self, client: httpx.AsyncClient) -> None:
        while True:
            image = sqlite_image(self.source, self._images[-1])
            self._images.append(image)
            answer = await self._ask(client, "PUT", f"{APP}/image", content=image)
            assert answer.status_code == 200, answer.text
            self._images = [image]
            self.done["image"] += 1
            answer = await self._ask(client, "GET", f"{APP}/image")
            assert answer.content == image, "the image reads otherwise than it was put"

    async def _keep_busy(self, client: httpx.AsyncClient) -> None:
        while True:
            body = frame([self.source.randbytes(self.source.choice([10, 3000])) for _ in range(6)])
            answer = await self._ask(
                client, "POST", f"{BUSY}/records", content=body, headers={"Content-Type": RECORDS}
            )
            assert answer.status_code in {201, 429}, answer.text
            self.done["busy append"] += 1

    async def _meddle(self, client: httpx.AsyncClient) -> None:
        steps: list[Callable[[httpx.AsyncClient], Awaitable[None]]] = [
            *[self._checkpoint] * 6, *[self._truncate] * 3, *[self._snapshot] * 2, self._unsnapshot,
            *[self._fork] * 2, self._unfork, self._retain, self._collect,
        ]  # fmt: skip
        while True:
            step = self.source.choice(steps)
            await step(client)
            self.done[step.__name__.strip("_")] += 1

    async def _checkpoint(self, client: httpx.AsyncClient) -> None:
        name = self.source.choice(["log", "app", "busy"])
        body = {"tenant": "acme", "database": name}
        answer = await self._ask(client, "POST", "/checkpoints", json=body)
        assert answer.status_code == 202, answer.text
        if self.source.random() < 0.7:
            await self._ask(client, "GET", f"{answer.headers['Location']}?wait=5")

    async def _truncate(self, client: httpx.AsyncClient) -> None:
        shown = (await self._ask(client, "GET", BUSY)).json()
        lsn = self.source.randint(shown["first_lsn"], shown["next_lsn"])
        body = {
            "tenant": "acme", "database": "busy", "lsn": lsn,
            "direction": self.source.choice(["head", "head", "tail"]),
        }  # fmt: skip
        answer = await self._ask(client, "POST", "/truncations", json=body)
        assert answer.status_code in {202, 410, 422}, answer.text

    async def _snapshot(self, client: httpx.AsyncClient) -> None:
        path, name = self.source.choice([LOG, APP, BUSY]), f"s{next(self._names)}"
        self._snapshots.add(f"{path}/snapshots/{name}")
        answer = await self._ask(client, "POST", f"{path}/snapshots", json={"name": name})
        assert answer.status_code in {201, 409}, answer.text

    async def _unsnapshot(self, client: httpx.AsyncClient) -> None:
        if self._snapshots:
            url = self.source.choice(sorted(self._snapshots))
            answer = await self._ask(client, "DELETE", url)
            assert answer.status_code in {204, 404}, answer.text
            self._snapshots.discard(url)

    async def _fork(self, client: httpx.AsyncClient) -> None:
        if len(self._forks) >= 6:
            await self._unfork(client)
        path, name = self.source.choice([LOG, APP, BUSY]), f"f{next(self._names)}"
        self._forks.add(f"{TENANT}/{name}")
        answer = await self._ask(client, "POST", f"{path}/forks", json={"database": name})
        assert answer.status_code in {201, 409}, answer.text

    async def _unfork(self, client: httpx.AsyncClient) -> None:
        if self._forks:
            url = self.source.choice(sorted(self._forks))
            answer = await self._ask(client, "DELETE", url)
            assert answer.status_code in {202, 404}, answer.text
            self._forks.discard(url)

    async def _retain(self, client: httpx.AsyncClient) -> None:
        path = self.source.choice([LOG, APP, BUSY])
        rule = {
            "keep_generations": self.source.choice([None, 1, 3]),
            "keep_seconds": self.source.choice([0, 0, 1, 86_400]),
            "minimum_generations": self.source.choice([1, 2]),
        }
        answer = await self._ask(client, "PATCH", path, json={"retention": rule})
        assert answer.status_code == 200, answer.text

    async def _collect(self, client: httpx.AsyncClient) -> None:
        answer = await self._ask(client, "POST", "/admin/gc/run", json={})
        assert answer.status_code == 200, answer.text

    async def _ask(
        self, client: httpx.AsyncClient, method: str, url: str, **options: Any
    ) -> httpx.Response:
        try:
            answer = await client.request(method, url, **options)
        except httpx.TransportError as error:
            raise Crashed(f"{method} {url}: {error!r}") from error
        assert answer.status_code < 500, f"{method} {url}: {answer.text}"
        return answer

    # --- after a kill

    async def check(self, server: ServerProcess) -> None:
        """The service runs again. Whatever was not answered has happened by now, or never will."""
        client = server.client
        for attempt in self.attempts:
            if attempt.outcome == "unknown" and attempt.ended == inf:
                attempt.ended = next(self._moments)
        log = await self._read_log(client)
        self.told.append(
            Told(began=next(self._moments), ended=next(self._moments), next_lsn=len(log) + 1)
        )
        self.done["records checked"] = check_history(self.attempts, self.told, log)
        answer = await self._ask(client, "GET", f"{APP}/image")
        assert answer.status_code == 200, answer.text
        assert answer.content in self._images, "the image is neither the old nor the new one"
        self._images = [answer.content]
        await wait_until(lambda: self._is_idle(client), timeout=IDLE_SECONDS, describe="idle jobs")
        found = (await self._ask(client, "GET", "/debug/manifest/fsck")).json()
        assert found["findings"] == [], found
        for path in (LOG, APP, BUSY):
            shown = (await self._ask(client, "GET", path)).json()
            assert shown["health"]["state"] == "ok", shown
        assert await self._items(client, "/debug/checkpoint/leases") == []

    async def _read_log(self, client: httpx.AsyncClient) -> list[tuple[int, bytes]]:
        end, found = (await self._ask(client, "GET", LOG)).json()["next_lsn"], []
        at = 1
        while at < end:
            answer = await self._ask(client, "GET", f"{LOG}/records?from_lsn={at}&to_lsn={end - 1}")
            assert answer.status_code == 200, answer.text
            found += enumerate(unframe(answer.content), start=int(answer.headers["Bop-First-Lsn"]))
            at = int(answer.headers["Bop-Next-Lsn"])
        return found

    async def _is_idle(self, client: httpx.AsyncClient) -> bool:
        return not await self._items(client, "/debug/checkpoint/active_jobs")

    async def _items(self, client: httpx.AsyncClient, url: str) -> list[Any]:
        items: list[Any] = (await self._ask(client, "GET", url)).json()["items"]
        return items


def sqlite_image(source: random.Random, before: bytes) -> bytes:
    """A file whose header SQLite would take; where there was one before, some pages differ."""
    pages = 1 + source.randrange(400) if not before or source.random() < 0.2 else 0
    if not pages:
        made = [before[at : at + PAGE] for at in range(0, len(before), PAGE)]
    else:
        made = [source.randbytes(PAGE // 4) * 4 for _ in range(pages)]
    for _ in range(source.randrange(1, 20)):
        made[source.randrange(len(made))] = source.randbytes(PAGE)
    counter = source.randrange(1 << 31)
    head = bytearray(made[0])
    head[:24] = b"SQLite format 3\0" + PAGE.to_bytes(2, "big") + bytes([2, 2, 0, 64, 32, 32])
    head[24:32] = counter.to_bytes(4, "big") + len(made).to_bytes(4, "big")
    head[92:96] = counter.to_bytes(4, "big")
    made[0] = bytes(head)
    return b"".join(made)
