"""A random walk over publishing, snapshots, forks, retention, deletion, collection and kills,
against a plain model: what can be read reads back right, and at the end nothing is left.

The seed is in the test's id; a failure tells the steps.
"""

import random
import struct
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from app.container import fsck
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.server import ServerProcess

ROOT = "/tenants/acme/databases"
PAGE = 4096
STEPS = 60
ACTIONS = (
    *("publish",) * 8, *("collect",) * 3, "fork", "fork", "snapshot", "snapshot", "unsnapshot",
    "retain", "delete", "create", "kill", "read", "read",
)  # fmt: skip


@dataclass
class Model:
    """A database as it ought to be."""

    content: bytes
    generations: dict[int, bytes] = field(default_factory=dict)
    snapshots: dict[str, int] = field(default_factory=dict)


class Walk:
    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.server = server
        self.source = random.Random(seed)
        self.models: dict[str, Model] = {}
        self.count = 0
        self.steps: list[str] = []

    async def call(self, method: str, path: str, *expected: int, **options: Any) -> Any:
        answer: httpx.Response = await self.server.client.request(method, path, **options)
        assert answer.status_code in expected, (method, path, answer.text, self.steps)
        return answer

    def pick(self) -> tuple[str, Model]:
        name = self.source.choice(sorted(self.models))
        return name, self.models[name]

    async def step(self) -> None:
        action = self.source.choice(ACTIONS) if self.models else "create"
        self.steps.append(action)
        await getattr(self, action)()

    # --- what happens

    async def create(self) -> None:
        if len(self.models) >= 4:
            return
        self.count += 1
        name = self.source.choice(["again", f"d{self.count}"])  # a name may come back
        if name in self.models:
            return
        body = {"engine": "libsql", "page_size": PAGE, "chunk_bytes": 65536}
        await self.call("PUT", f"{ROOT}/{name}", 201, json=body)
        self.models[name] = Model(image_of(self.source, 40))

    async def publish(self) -> None:
        name, model = self.pick()
        model.content = changed(self.source, model.content)
        await self.call("PUT", f"{ROOT}/{name}/image", 200, content=model.content)
        body = {"tenant": "acme", "database": name}
        job = (await self.call("POST", "/checkpoints", 202, json=body)).json()
        job = (await self.call("GET", f"/jobs/{job['id']}?wait=30", 200)).json()
        assert job["state"] == "completed", (job, self.steps)
        model.generations[job["result"]["generation"]] = model.content

    async def fork(self) -> None:
        name, model = self.pick()
        readable = await self.retained(name)
        if not readable or len(self.models) >= 4:
            return
        self.count += 1
        generation = self.source.choice(readable)
        body = {"database": f"f{self.count}", "generation": generation}
        await self.call("POST", f"{ROOT}/{name}/forks", 201, json=body)
        content = model.generations[generation]
        self.models[f"f{self.count}"] = Model(content, {generation: content})

    async def snapshot(self) -> None:
        name, model = self.pick()
        readable = await self.retained(name)
        if readable:
            self.count += 1
            body = {"name": f"s{self.count}", "generation": self.source.choice(readable)}
            await self.call("POST", f"{ROOT}/{name}/snapshots", 201, json=body)
            model.snapshots[body["name"]] = body["generation"]

    async def unsnapshot(self) -> None:
        name, model = self.pick()
        if model.snapshots:
            snapshot = self.source.choice(sorted(model.snapshots))
            await self.call("DELETE", f"{ROOT}/{name}/snapshots/{snapshot}", 204)
            del model.snapshots[snapshot]

    async def retain(self) -> None:
        name, _ = self.pick()
        keep = self.source.choice([1, 2, 4])
        rule = {"keep_generations": keep, "keep_seconds": None, "minimum_generations": 1}
        await self.call("PATCH", f"{ROOT}/{name}", 200, json={"retention": rule})

    async def delete(self) -> None:
        name, _ = self.pick()
        job = (await self.call("DELETE", f"{ROOT}/{name}?snapshots=delete", 202)).json()
        del self.models[name]
        await self.call("GET", f"{ROOT}/{name}", 404)
        if self.source.random() < 0.5:
            job = (await self.call("GET", f"/jobs/{job['id']}?wait=30", 200)).json()
            assert job["state"] == "completed", (job, self.steps)

    async def kill(self) -> None:
        await self.server.kill9()
        await self.server.start()
        await self.collect()  # the first round of a process runs beside whatever comes first

    async def collect(self) -> None:
        report = (await self.call("POST", "/admin/gc/run", 200, json={})).json()
        assert (report["failed_blobs"], report["paused"]) == (0, False), self.steps

    async def read(self) -> None:
        name, model = self.pick()
        await self.check(name, model)

    # --- what must hold

    async def retained(self, name: str) -> list[int]:
        found = (await self.call("GET", f"{ROOT}/{name}/generations?limit=1000", 200)).json()
        return [one["generation"] for one in found["items"]]

    async def image(self, name: str, **selector: Any) -> bytes:
        content: bytes = (
            await self.call("GET", f"{ROOT}/{name}/image", 200, params=selector)
        ).content
        return content

    async def check(self, name: str, model: Model) -> None:
        readable = await self.retained(name)
        assert set(readable) <= model.generations.keys()
        assert set(model.snapshots.values()) <= set(readable), self.steps
        for generation in readable:
            content = await self.image(name, generation=generation)
            assert content == model.generations[generation], (name, generation, self.steps)
        for generation in model.generations.keys() - set(readable):
            await self.call("GET", f"{ROOT}/{name}/image?generation={generation}", 410)
        if readable:
            assert await self.image(name) == model.content, self.steps

    async def settle(self) -> None:
        """Everything on the store is kept for a reason, or known to be an orphan of a kill."""
        for name, model in sorted(self.models.items()):
            await self.check(name, model)
        while (await self.call("GET", "/debug/checkpoint/active_jobs", 200)).json()["items"]:
            pass
        await self.call("POST", "/admin/gc/run", 200, json={"orphans": "delete"})
        findings = (await self.call("GET", "/debug/manifest/fsck", 200)).json()["findings"]
        assert findings == [], self.steps
        for key in self.objects():
            told = await self.call("GET", "/debug/blobs/explain", 200, params={"key": key})
            assert told.json()["state"] == "kept", (told.json(), self.steps)

    def objects(self) -> list[str]:
        root = self.server.data_dir / "remote"
        return [
            str(path.relative_to(root))
            for folder in ("checkpoints", "generations", "snapshots")
            for path in (root / folder).rglob("*")
            if path.is_file()
        ]


def image_of(source: random.Random, pages: int) -> bytes:
    """A header that SQLite would accept, and pages of noise."""
    head = bytearray(PAGE)
    head[:16] = b"SQLite format 3\0"
    head[16:18] = struct.pack(">H", PAGE)
    head[18:24] = bytes([1, 1, 0, 64, 32, 32])
    head[28:32] = struct.pack(">I", pages)
    return bytes(head) + source.randbytes(PAGE * (pages - 1))


def changed(source: random.Random, image: bytes) -> bytes:
    """Some pages new, and now and then more or fewer of them."""
    pages = max(2, len(image) // PAGE + source.choice([0, 0, 0, 9, -9]))
    result = bytearray(image[: pages * PAGE].ljust(pages * PAGE, b"\1"))
    result[28:32] = struct.pack(">I", pages)
    for _ in range(source.choice([1, 2, 20])):
        place = source.randrange(1, pages) * PAGE
        result[place : place + PAGE] = source.randbytes(PAGE)
    return bytes(result)


@pytest.mark.parametrize("seed", [11, 12])
async def test_random_walk(make_server: MakeServer, seed: int) -> None:
    server = make_server(
        settings={
            "BOP_GC_GRACE_SECONDS": "0",
            "BOP_GC_ORPHAN_AGE_SECONDS": "0",
            "BOP_GC_INTERVAL_SECONDS": "3600",
        }
    )
    await server.start()
    walk = Walk(server, seed)
    for _ in range(STEPS):
        await walk.step()
    await walk.settle()
    for name in sorted(walk.models):
        await walk.call("DELETE", f"{ROOT}/{name}?snapshots=delete", 202)
    walk.models.clear()
    await walk.settle()
    assert walk.objects() == [], walk.steps
    stats = (await walk.call("GET", "/debug/manifest/stats", 200)).json()
    assert stats["entries"]["databases"] == 0
    assert await server.terminate() == 0, server.log_tail()
    assert (await fsck(Settings(data_dir=server.data_dir))).findings == ()
