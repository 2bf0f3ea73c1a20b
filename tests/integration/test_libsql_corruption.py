"""Damaged blobs in the bucket: `corrupt_blob` or the right bytes, never wrong ones."""

import asyncio
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from operator import xor
from pathlib import Path
from typing import Literal

import httpx
import pytest

from app.core.formats.container import CONTAINER_HEADER_BYTES, CONTAINER_TRAILER_BYTES
from tests.conftest import MakeServer
from tests.helpers.server import ServerProcess

PAGE = 512
CHUNK_BYTES = 65536
DATABASES = 20
BODY_RANGES = 32
CUT_SHORT = (0, 1, CONTAINER_TRAILER_BYTES, -CONTAINER_TRAILER_BYTES, -1)
"""Lengths; negative: that many bytes less."""

Damage = Callable[[bytes], bytes]
Outcome = Literal["right", "corrupt"]


@dataclass(frozen=True, slots=True)
class Stored:
    """A database of two generations: a base, and a delta against it."""

    path: str
    contents: tuple[bytes, bytes]
    base: Path
    delta: Path

    def content(self, generation: int) -> bytes:
        return self.contents[generation - 1]


def two_states(path: Path) -> tuple[bytes, bytes]:
    """A database file that fits into a chunk, before and after scattered changes."""
    source = random.Random(5)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute(f"PRAGMA page_size = {PAGE}")
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x)")
        db.execute("BEGIN")
        for row in range(90):
            db.execute("INSERT INTO t VALUES (?, ?)", (row, source.randbytes(200) + b"text" * 40))
        db.execute("COMMIT")
        before = path.read_bytes()
        db.execute("BEGIN")
        for row in range(0, 90, 4):  # in part patches, in part new pages
            db.execute("UPDATE t SET x = ? || substr(x, 9) WHERE id = ?", (b"changed!", row))
        db.execute("UPDATE t SET x = ? WHERE id = 13", (source.randbytes(360),))
        db.execute("COMMIT")
        after = path.read_bytes()
    assert len(before) == len(after) <= CHUNK_BYTES
    return before, after


async def make(server: ServerProcess, name: str, contents: tuple[bytes, bytes]) -> Stored:
    client, path = server.client, f"/tenants/acme/databases/{name}"
    fields = {"engine": "libsql", "page_size": PAGE, "chunk_bytes": CHUNK_BYTES}
    assert (await client.put(path, json=fields)).status_code == 201
    blobs = []
    for content, action in zip(contents, ("rewrite_base", "create_delta"), strict=True):
        assert (await client.put(f"{path}/image", content=content)).status_code == 200
        answer = await client.post("/checkpoints", json={"tenant": "acme", "database": name})
        job = (await client.get(f"/checkpoints/{answer.json()['id']}?wait=60")).json()
        (chunk,) = job["result"]["chunks"]
        assert chunk["action"] == action
        blobs.append(server.data_dir / "remote" / chunk["blob_key"])
    return Stored(path, contents, *blobs)


def flips(length: int) -> Iterator[Damage]:
    """Each byte range in turn, one bit of it or all of it."""
    tail = length - CONTAINER_TRAILER_BYTES
    step = max(1, (tail - CONTAINER_HEADER_BYTES) // BODY_RANGES)
    edges = [
        *range(0, CONTAINER_HEADER_BYTES, 8),
        *range(CONTAINER_HEADER_BYTES, tail, step),
        *range(tail, length, 8),
        length,
    ]
    source = random.Random(length)
    for number, (first, end) in enumerate(pairwise(edges)):
        mask = bytearray(length)
        if number % 2:
            mask[first:end] = b"\xff" * (end - first)
        else:
            mask[source.randrange(first, end)] = 1 << source.randrange(8)
        yield lambda data, mask=bytes(mask): bytes(map(xor, data, mask))


def cuts() -> Iterator[Damage]:
    for length in CUT_SHORT:
        yield lambda data, length=length: data[:length]


async def image(client: httpx.AsyncClient, stored: Stored, generation: int) -> Outcome:
    """An answer that has begun may end early, but not go on wrong."""
    expected = stored.content(generation)
    got = bytearray()
    try:
        async with client.stream(
            "GET", f"{stored.path}/image", params={"generation": generation}
        ) as answer:
            if answer.status_code != 200:
                return corrupt(answer.status_code, await answer.aread(), answer)
            async for piece in answer.aiter_raw():
                got += piece
    except httpx.RemoteProtocolError:
        assert expected.startswith(got)
        return "corrupt"
    assert got == expected
    return "right"


async def page(client: httpx.AsyncClient, stored: Stored, number: int, generation: int) -> Outcome:
    answer = await client.get(f"{stored.path}/pages/{number}", params={"generation": generation})
    if answer.status_code != 200:
        return corrupt(answer.status_code, answer.content, answer)
    assert answer.content == stored.content(generation)[(number - 1) * PAGE : number * PAGE]
    return "right"


def corrupt(status: int, body: bytes, answer: httpx.Response) -> Outcome:
    assert (status, answer.json()["code"]) == (500, "corrupt_blob"), body
    return "corrupt"


async def read(client: httpx.AsyncClient, stored: Stored, generation: int) -> set[Outcome]:
    pages = len(stored.content(generation)) // PAGE
    chosen = random.Random(stored.path).sample(range(1, pages + 1), 4)
    return {
        *[await page(client, stored, number, generation) for number in chosen],
        await image(client, stored, generation),
    }


@pytest.mark.parametrize("damaged", ["base", "delta"])
async def test_a_damaged_blob_never_gives_wrong_pages(
    make_server: MakeServer, tmp_path: Path, damaged: str
):
    server = make_server()
    await server.start()
    contents = two_states(tmp_path / "source.db")
    databases = await asyncio.gather(*(make(server, f"db-{n}", contents) for n in range(DATABASES)))
    files = [one.base if damaged == "base" else one.delta for one in databases]
    sound = [file.read_bytes() for file in files]
    damages = [*flips(len(sound[0])), *cuts()]

    async def check_round(some: list[Damage]) -> list[Outcome]:
        """Each on a database of its own; nothing of it is cached."""
        for file, data, damage in zip(files, sound, some, strict=False):
            file.unlink()  # it may be one file with that of the hot cache
            file.write_bytes(damage(data))
            assert file.read_bytes() != data
        await server.kill9()
        shutil.rmtree(server.data_dir / "hot_cache")
        shutil.rmtree(server.data_dir / "directories")
        await server.start()
        tried = databases[: len(some)]
        newest = await asyncio.gather(*(read(server.client, one, 2) for one in tried))
        of_base = await asyncio.gather(*(read(server.client, one, 1) for one in tried))
        assert damaged == "base" or of_base == [{"right"}] * len(tried)
        for file, data in zip(files, sound, strict=True):
            file.write_bytes(data)
        return ["corrupt" if "corrupt" in each else "right" for each in newest]

    outcomes: list[Outcome] = []
    for first in range(0, len(damages), DATABASES):
        outcomes += await check_round(damages[first : first + DATABASES])
    assert len(outcomes) == len(damages)
    # what is read by ranges does not need the header, and a whole page not its digest
    assert outcomes.count("corrupt") > len(damages) // 2, outcomes

    await server.kill9()
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.start()
    answers = await asyncio.gather(*(read(server.client, one, 2) for one in databases))
    assert answers == [{"right"}] * DATABASES, "what is whole again is read again"
