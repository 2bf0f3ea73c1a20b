"""`PUT …/image` for a database without content: written once, into what becomes its log."""

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from app.container import fsck
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.failpoints import kill_at
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until

DB = "/tenants/acme/databases/app"
MIB = 1024 * 1024
SMALL_MEMORY = {"BOP_BODY_MEMORY_BYTES": str(MIB)}
"""So that a body of two MiB does not fit."""
CHUNK = {"chunk_bytes": 256 * 1024}


def image_of(path: Path, *, page_size: int, size_bytes: int, seed: int = 1) -> bytes:
    chance = random.Random(seed)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA page_size = {page_size}")
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x)")
    while path.stat().st_size < size_bytes:
        rows = [(chance.randbytes(3000),) for _ in range(100)]
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO t (x) VALUES (?)", rows)
        connection.execute("COMMIT")
    connection.close()
    return path.read_bytes()


@pytest.fixture
async def server(make_server: MakeServer) -> ServerProcess:
    server = make_server(settings=SMALL_MEMORY)
    await server.start()
    return server


async def create(client: httpx.AsyncClient, *, page_size: int, name: str = DB) -> None:
    answer = await client.put(name, json={"engine": "libsql", "page_size": page_size, **CHUNK})
    assert answer.status_code == 201, answer.text


async def check_content(client: httpx.AsyncClient, image: bytes, *, name: str = DB) -> None:
    answer = await client.get(f"{name}/image")
    assert answer.status_code == 200
    assert answer.content == image


def written_bytes(server: ServerProcess) -> int:
    lines = Path(f"/proc/{server.pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def unnamed_files(server: ServerProcess) -> list[str]:
    found: list[str] = []
    for fd in Path(f"/proc/{server.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if fd.stat().st_nlink == 0 and str(fd.readlink()).startswith(str(server.data_dir)):
                found.append(str(fd.readlink()))
    return found


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
async def test_it_is_written_once(server: ServerProcess, tmp_path: Path, page_size: int) -> None:
    image = image_of(tmp_path / "app.db", page_size=page_size, size_bytes=6 * MIB)
    await create(server.client, page_size=page_size)
    before = written_bytes(server)
    answer = await server.client.put(f"{DB}/image", content=image)
    assert answer.status_code == 200, answer.text
    pages = len(image) // page_size
    assert answer.json() == {"lsn": pages, "page_count": pages, "changed_pages": pages}
    assert written_bytes(server) - before < 1.2 * len(image)
    await check_content(server.client, image)
    assert unnamed_files(server) == []
    # the second one is compared with it
    before = written_bytes(server)
    changed = image_of(tmp_path / "b.db", page_size=page_size, size_bytes=6 * MIB, seed=2)
    answer = await server.client.put(f"{DB}/image", content=changed)
    assert 0 < answer.json()["changed_pages"] <= pages
    assert written_bytes(server) - before > 1.8 * len(image)
    await check_content(server.client, changed)
    await server.restart()
    await check_content(server.client, changed)
    assert await server.terminate() == 0
    assert (await fsck(Settings(data_dir=server.data_dir))).findings == ()


@pytest.mark.parametrize(
    "failpoint",
    [
        "wal.mid_write", "wal.before_write", "wal.mid_link", "wal.after_write", "wal.after_fsync",
        "wal.before_register", "wal.after_register",
    ],
)  # fmt: skip
async def test_a_crash_leaves_all_of_it_or_nothing(
    server: ServerProcess, tmp_path: Path, failpoint: str
) -> None:
    image = image_of(tmp_path / "app.db", page_size=4096, size_bytes=2 * MIB)
    pages = len(image) // 4096
    await create(server.client, page_size=4096)
    for nth in (1, 3):
        await server.restart(failpoints=kill_at(failpoint, nth=nth))
        with suppress(httpx.TransportError):
            await server.client.put(f"{DB}/image", content=image)
            await server.client.put(f"{DB}/image", content=image[::-1])  # refused: not written
        if nth == 1 or failpoint in {"wal.mid_write", "wal.mid_link"}:
            await server.wait_exit()
        await server.restart(failpoints={})
        shown = (await server.client.get(DB)).json()
        assert shown["health"]["state"] == "ok"
        assert shown["next_lsn"] in {1, pages + 1, pages + 2}  # sent again, it differs in nothing
        if shown["next_lsn"] > 1:
            await check_content(server.client, image)
    answer = await server.client.put(f"{DB}/image", content=image)
    assert answer.status_code == 200
    await check_content(server.client, image)
    assert await server.terminate() == 0
    assert (await fsck(Settings(data_dir=server.data_dir))).findings == ()
    assert [path.name for path in (server.data_dir / "wal").iterdir()] == ["1"]


async def test_one_that_breaks_off_leaves_nothing(server: ServerProcess, tmp_path: Path) -> None:
    image = image_of(tmp_path / "app.db", page_size=4096, size_bytes=8 * MIB)
    await create(server.client, page_size=4096)
    seen: list[str] = []

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, 6 * MIB, MIB):
            yield image[at : at + MIB]
        await wait_until(lambda: len(unnamed_files(server)) > 2)
        seen.extend(unnamed_files(server))
        raise ConnectionAbortedError

    headers = {"Content-Length": str(len(image))}
    with pytest.raises(ConnectionAbortedError):
        await server.client.put(f"{DB}/image", content=pieces(), headers=headers)
    assert all("/wal/" in name for name in seen), seen
    await wait_until(lambda: unnamed_files(server) == [])
    assert (await server.client.get(DB)).json()["next_lsn"] == 1
    assert not list((server.data_dir / "wal").glob("*/*"))
    answer = await server.client.put(f"{DB}/image", content=image)
    assert answer.status_code == 200
    await check_content(server.client, image)


async def test_two_first_images_at_once(server: ServerProcess, tmp_path: Path) -> None:
    images = [
        image_of(tmp_path / f"{seed}.db", page_size=4096, size_bytes=3 * MIB, seed=seed)
        for seed in (1, 2)
    ]
    await create(server.client, page_size=4096)
    both = asyncio.Barrier(2)

    async def put(image: bytes) -> int:
        async def pieces() -> AsyncIterator[bytes]:
            yield image[: 2 * MIB]
            await both.wait()
            yield image[2 * MIB :]

        headers = {"Content-Length": str(len(image))}
        answer = await server.client.put(f"{DB}/image", content=pieces(), headers=headers)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["lsn"])

    lsns = await asyncio.gather(*map(put, images))
    await check_content(server.client, images[lsns.index(max(lsns))])
    await server.kill9()
    await server.start()
    await check_content(server.client, images[lsns.index(max(lsns))])


async def test_one_that_cannot_be_stored_is_refused_before_it_has_come(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server(settings=SMALL_MEMORY | {"BOP_WAL_BUDGET_BYTES": str(4 * MIB)})
    await server.start()
    image = image_of(tmp_path / "app.db", page_size=4096, size_bytes=8 * MIB)
    await create(server.client, page_size=4096)
    for length, status, code in (
        (len(image), 413, "transaction_too_large"),
        (len(image) - 1, 400, "image_invalid"),
        (len(image) + 4096, 400, "image_invalid"),
    ):
        before = written_bytes(server)
        body = (image + bytes(4096))[:length]
        answer = await server.client.put(f"{DB}/image", content=body)
        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert written_bytes(server) - before < MIB, "as soon as its head was there"
    assert (await server.client.get(DB)).json()["next_lsn"] == 1


async def test_a_client_that_sends_on_sees_why_it_was_refused(
    server: ServerProcess, tmp_path: Path
) -> None:
    """Most clients look for an answer only when they have sent all of it."""
    head = image_of(tmp_path / "app.db", page_size=4096, size_bytes=MIB)[:4096]
    await create(server.client, page_size=4096)
    count = 160

    async def pieces() -> AsyncIterator[bytes]:
        for number in range(count):
            yield (head if number == 0 else b"").ljust(MIB, b"x")

    headers = {"Content-Length": str(count * MIB)}
    answer = await server.client.put(f"{DB}/image", content=pieces(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (400, "image_invalid")
    assert answer.headers["Connection"] == "close"


async def test_what_an_image_replaces_can_be_made_sure_of(
    server: ServerProcess, tmp_path: Path
) -> None:
    one, two = (
        image_of(tmp_path / f"{seed}.db", page_size=4096, size_bytes=2 * MIB, seed=seed)
        for seed in (1, 2)
    )
    await create(server.client, page_size=4096)

    async def put(image: bytes, **headers: str) -> httpx.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return await server.client.put(f"{DB}/image", content=image, headers=sent)

    async def etag() -> str:
        return (await server.client.head(f"{DB}/image")).headers["ETag"]

    answer = await put(one, If_Match="*")
    assert (answer.status_code, answer.json()["code"]) == (412, "precondition_failed")
    assert (await put(one, If_None_Match="*")).status_code == 200
    first = await etag()
    answer = await put(two, If_None_Match="*")
    assert (answer.status_code, answer.json()["etag"]) == (412, first)
    for names_another in ('"1-1"', f"W/{first}", "", "nothing", f'"x", {first[:-1]}9"'):
        assert (await put(two, If_Match=names_another)).status_code == 412, names_another
    assert (await put(two, If_None_Match=f"W/{first}")).status_code == 412
    assert await etag() == first
    await check_content(server.client, one)
    # of two that replace the same, one does
    answers = await asyncio.gather(*(put(two, If_Match=f'"x", {first}') for _ in range(2)))
    assert sorted(answer.status_code for answer in answers) == [200, 412]
    await check_content(server.client, two)
    assert (await put(one, If_Match="*")).status_code == 200
    await server.restart()
    assert (await put(two, If_Match=await etag())).status_code == 200
    job = (
        await server.client.post("/checkpoints", json={"tenant": "acme", "database": "app"})
    ).json()
    await server.client.get(f"/checkpoints/{job['id']}?wait=30")
    await server.restart()
    assert (await put(one, If_Match=await etag())).status_code == 200
    await check_content(server.client, one)
