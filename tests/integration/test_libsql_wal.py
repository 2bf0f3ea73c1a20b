"""`POST …/wal` and `PUT …/image` on the real service, with logs that real SQLite wrote.

What is stored is read twice: as the service serves it, and from the segments' own entries.
"""

import asyncio
import random
import shutil
import sqlite3
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.formats.frame_run import frames_of
from app.core.formats.segment import (
    ENTRY_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    TRAILER_MAGIC,
    EntryFlag,
    check_entry,
)
from tests.conftest import MakeServer
from tests.helpers.failpoints import kill_at
from tests.helpers.server import ServerProcess
from tests.helpers.sqlite_logs import log_of, reencoded, wal_database
from tests.helpers.wait import wait_until

DB = "/tenants/acme/databases/app"
MIB = 1024 * 1024
GAP_FIELDS = ("last_lsn", "offset", "salt1", "salt2", "checksum1", "checksum2")
SIZES = (512, 4096, 65536)


# --- what is stored


class StoredWal:
    """All segments of the one database, read entry by entry."""

    def __init__(self, server: ServerProcess, page_size: int) -> None:
        self.pages: dict[int, bytes] = {}
        self.page_count = 0
        self.lsns: list[int] = []
        self.requests = 0
        self.frames: list[int] = []
        for path in sorted((server.data_dir / "wal" / "1").glob("*.wal")):
            data = path.read_bytes()
            at = SEGMENT_HEADER_BYTES
            while at < len(data) and data[at : at + 4] == b"\xb0PE\x01":
                entry = check_entry(data, offset=at)
                self._take(entry, data[at + ENTRY_HEADER_BYTES : at + entry.entry_bytes], page_size)
                at += entry.entry_bytes
            if at < len(data):
                assert TRAILER_MAGIC in data[at:]

    def _take(self, entry: Any, payload: bytes, page_size: int) -> None:
        frames = frames_of(payload, page_size=page_size)
        assert len(frames) == entry.count
        assert (frames.footer is not None) == bool(entry.flags & EntryFlag.ENDS)
        self.lsns.extend(range(entry.first_lsn, entry.first_lsn + entry.count))
        for index in range(len(frames)):
            self.pages[int(frames.page_nos[index])] = bytes(frames.page(index))
            self.frames.append(int(frames.page_nos[index]))
            size = int(frames.commit_sizes[index])
            if size:
                self.page_count = size
                self.pages = {no: page for no, page in self.pages.items() if no <= size}
        if frames.footer is not None:
            self.requests += 1
            assert frames.footer.page_count == self.page_count

    def image(self, page_size: int) -> bytes:
        zeros = bytes(page_size)
        return b"".join(self.pages.get(no, zeros) for no in range(1, self.page_count + 1))


def wal_bytes_on_disk(server: ServerProcess) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (server.data_dir / "wal").glob("1/*.wal")}


async def check_content(server: ServerProcess, expected: bytes, *, page_size: int) -> None:
    shown = (await server.client.get(DB)).json()
    assert shown["page_count"] * page_size == len(expected)
    answer = await server.client.get(f"{DB}/image")
    assert answer.status_code == 200, answer.text
    assert answer.content == expected


# --- the application's side


class Source:
    """An application's database: its connection, log, and content as a file of its own."""

    def __init__(self, path: Path, connection: sqlite3.Connection, page_size: int) -> None:
        self.path = path
        self.connection = connection
        self.page_size = page_size
        self.frame = 24 + page_size

    def run(self, *statements: str) -> None:
        for statement in statements:
            self.connection.execute(statement).fetchall()

    def log(self) -> bytes:
        return log_of(self.path)

    def image(self) -> bytes:
        """The committed content, as SQLite itself puts log and file together."""
        copy = self.path.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for name in (self.path.name, f"{self.path.name}-wal"):
            if self.path.with_name(name).exists():
                shutil.copy(self.path.with_name(name), copy / name)
        connection = sqlite3.connect(copy / self.path.name)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        connection.close()
        return (copy / self.path.name).read_bytes()

    def restart_log(self) -> None:
        self.run("PRAGMA wal_checkpoint(TRUNCATE)")

    def grow(self, count: int, *, width: int = 300) -> None:
        self.run("BEGIN")
        self.connection.executemany("INSERT INTO t (x) VALUES (randomblob(?))", [(width,)] * count)
        self.run("COMMIT")


@contextmanager
def source(directory: Path, *, page_size: int = 4096, auto_vacuum: int = 0) -> Iterator[Source]:
    directory.mkdir(exist_ok=True)
    path = directory / "app.db"
    with wal_database(path, page_size=page_size, auto_vacuum=auto_vacuum) as connection:
        made = Source(path, connection, page_size)
        made.run("CREATE TABLE t (id INTEGER PRIMARY KEY, x)")
        yield made


async def create(client: httpx.AsyncClient, *, page_size: int = 4096, **fields: Any) -> None:
    answer = await client.put(DB, json={"engine": "libsql", "page_size": page_size, **fields})
    assert answer.status_code == 201, answer.text


async def push(
    client: httpx.AsyncClient, body: bytes, *, offset: int = 0, after_lsn: int | None = None
) -> httpx.Response:
    params = {"offset": offset} | ({} if after_lsn is None else {"after_lsn": after_lsn})
    return await client.post(f"{DB}/wal", params=params, content=body)


async def pushed(client: httpx.AsyncClient, body: bytes, **where: Any) -> dict[str, Any]:
    answer = await push(client, body, **where)
    assert answer.status_code == 200, answer.text
    return answer.json()


def salts(log: bytes) -> tuple[int, int]:
    return struct.unpack_from(">2I", log, 16)


def checksums(log: bytes, offset: int, frame: int) -> tuple[int, int]:
    at = 24 if offset == 32 else offset - frame + 16
    return struct.unpack_from(">2I", log, at)


def gap_of(answer: httpx.Response) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["code"]) == (409, "wal_gap"), answer.text
    return {name: answer.json()[name] for name in GAP_FIELDS}


async def checkpoint(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.post("/checkpoints", json={"tenant": "acme", "database": "app"})
    assert answer.status_code == 202, answer.text
    job = (await client.get(f"/checkpoints/{answer.json()['id']}?wait=60")).json()
    assert job["state"] == "completed", job
    return job


# --- logs


@pytest.mark.parametrize("page_size", SIZES)
async def test_a_log_goes_on_where_it_was_left(server: ServerProcess, tmp_path, page_size):
    await create(server.client, page_size=page_size)
    with source(tmp_path / "src", page_size=page_size) as src:
        src.grow(20)
        log = src.log()
        first = await pushed(server.client, log)
        frames = (len(log) - 32) // src.frame
        assert first == {
            "accepted_offset": len(log), "salt1": salts(log)[0], "salt2": salts(log)[1],
            "first_lsn": 1, "last_lsn": frames, "frames": frames,
            "commits": first["commits"], "page_count": len(src.image()) // page_size,
        }  # fmt: skip
        assert first["commits"] == 2
        await check_content(server, src.image(), page_size=page_size)

        at = first["accepted_offset"]
        for _ in range(3):
            src.grow(3, width=2 * page_size)
            more = src.log()
            answer = await pushed(server.client, more[at:], offset=at)
            assert answer["first_lsn"] == frames + 1
            frames = answer["last_lsn"]
            at = answer["accepted_offset"]
            assert (at, answer["commits"]) == (len(more), 1)
        await check_content(server, src.image(), page_size=page_size)
        stored = StoredWal(server, page_size)
        assert stored.lsns == list(range(1, frames + 1))
        assert stored.image(page_size) == src.image()


async def test_logs_of_the_other_byte_order_are_taken(server: ServerProcess, tmp_path):
    await create(server.client, page_size=512)
    with source(tmp_path / "src", page_size=512) as src:
        src.grow(9)
        for at, order in enumerate(("big", "little")):
            if at:
                src.restart_log()
                src.grow(2)
            log = reencoded(src.log(), order)
            last = (await server.client.get(DB)).json()["next_lsn"] - 1
            half = 32 + (len(log) - 32) // src.frame // 2 * src.frame
            answer = await pushed(server.client, log[:half], after_lsn=last)
            at_offset = answer["accepted_offset"]
            rest = (
                await pushed(server.client, log[at_offset:], offset=at_offset)
                if (at_offset)
                else await pushed(server.client, log, after_lsn=last)
            )
            assert rest["accepted_offset"] == len(log)
        await check_content(server, src.image(), page_size=512)


async def test_bytes_sent_again_are_not_stored_twice(make_server: MakeServer, tmp_path):
    server = make_server()
    await server.start()
    await create(server.client)
    with source(tmp_path / "src") as src:
        src.grow(5)
        log = src.log()
        first = await pushed(server.client, log)
        on_disk = wal_bytes_on_disk(server)
        for offset in (0, 32, 32 + src.frame):
            again = await pushed(server.client, log[offset:], offset=offset)
            assert again == {
                **first, "frames": 0, "commits": 0, "first_lsn": None, "last_lsn": None,
            }  # fmt: skip
        assert wal_bytes_on_disk(server) == on_disk
        await server.kill9()
        await server.start()
        assert (await pushed(server.client, log))["frames"] == 0
        assert wal_bytes_on_disk(server) == on_disk

        # with new bytes behind what is known, only those are stored
        src.grow(5)
        more = src.log()
        answer = await pushed(server.client, more)
        assert (answer["first_lsn"], answer["accepted_offset"]) == (
            first["last_lsn"] + 1, len(more),
        )  # fmt: skip

        # and the log before this one is known too
        src.restart_log()
        src.grow(1)
        newer = src.log()
        third = await pushed(server.client, newer, after_lsn=answer["last_lsn"])
        on_disk = wal_bytes_on_disk(server)
        for _ in range(2):
            old = await pushed(server.client, more)
            assert (old["accepted_offset"], old["salt1"], old["frames"]) == (
                len(more), salts(more)[0], 0,
            )  # fmt: skip
            await server.kill9()
            await server.start()
        assert wal_bytes_on_disk(server) == on_disk
        assert (await pushed(server.client, newer))["accepted_offset"] == third["accepted_offset"]
        await check_content(server, src.image(), page_size=4096)


async def test_the_position_outlives_the_wal(make_server: MakeServer, tmp_path):
    server = make_server()
    await server.start()
    await create(server.client, page_size=512, chunk_bytes=65536)
    with source(tmp_path / "src", page_size=512) as src:
        src.grow(5)
        older = src.log()
        first = await pushed(server.client, older)
        src.restart_log()
        src.grow(60)
        log = src.log()
        second = await pushed(server.client, log, after_lsn=first["last_lsn"])
        await checkpoint(server.client)
        await wait_until(lambda: not wal_bytes_on_disk(server))
        for _ in range(2):
            shown = (await server.client.get(DB)).json()
            assert shown["page_count"] == second["page_count"]
            assert shown["next_lsn"] == second["last_lsn"] + 1
            for body in (older, log):
                again = await pushed(server.client, body)
                assert (again["accepted_offset"], again["frames"]) == (len(body), 0)
            assert gap_of(await push(server.client, log, offset=len(log) + src.frame)) == {
                "last_lsn": second["last_lsn"], "offset": len(log),
                "salt1": salts(log)[0], "salt2": salts(log)[1],
                "checksum1": checksums(log, len(log), src.frame)[0],
                "checksum2": checksums(log, len(log), src.frame)[1],
            }  # fmt: skip
            assert not wal_bytes_on_disk(server)
            await server.kill9()
            await server.start()
        src.run("DELETE FROM t WHERE id > 20", "VACUUM")
        src.grow(3)
        more = src.log()
        third = await pushed(server.client, more[len(log) :], offset=len(log))
        assert third["first_lsn"] == second["last_lsn"] + 1
        await check_content(server, src.image(), page_size=512)
        src.grow(80)
        src.run("UPDATE t SET x = randomblob(length(x)) WHERE id = 3")
        image = src.image()
        differing = await put_image(server.client, image)
        assert differing["changed_pages"] < len(image) // 512
        await check_content(server, image, page_size=512)
        await checkpoint(server.client)
        await check_content(server, image, page_size=512)
        await server.kill9()
        await server.start()
        await check_content(server, image, page_size=512)


async def test_a_gap_says_where_to_go_on(server: ServerProcess, tmp_path):
    await create(server.client)
    with source(tmp_path / "src") as src:
        src.grow(5)
        log = src.log()
        nowhere = dict.fromkeys(GAP_FIELDS)
        assert gap_of(await push(server.client, log[32:], offset=32)) == nowhere | {"last_lsn": 0}
        assert gap_of(await push(server.client, log, after_lsn=7)) == nowhere | {"last_lsn": 0}
        told = (await push(server.client, log, after_lsn=7)).json()["detail"]
        assert told.startswith("Nothing is stored: a log begins with offset=0")

        first = await pushed(server.client, log)
        on_disk = wal_bytes_on_disk(server)
        here = {
            "last_lsn": first["last_lsn"], "offset": len(log),
            "salt1": salts(log)[0], "salt2": salts(log)[1],
            "checksum1": checksums(log, len(log), src.frame)[0],
            "checksum2": checksums(log, len(log), src.frame)[1],
        }  # fmt: skip
        src.grow(5)
        src.grow(5)
        more = src.log()
        beyond = len(log) + src.frame
        assert gap_of(await push(server.client, more[beyond:], offset=beyond)) == here
        assert gap_of(await push(server.client, more[beyond:], offset=len(log))) == here
        assert gap_of(await push(server.client, more[len(log) + 8 :], offset=len(log) + 8)) == here
        broken = bytearray(more[len(log) :])
        broken[100] ^= 1  # the chain is broken at the first frame, and goes on from the second
        assert gap_of(await push(server.client, bytes(broken), offset=len(log))) == here

        src.restart_log()
        src.grow(1)
        newer = src.log()
        assert gap_of(await push(server.client, newer)) == here
        assert gap_of(await push(server.client, newer, after_lsn=here["last_lsn"] - 1)) == here
        assert gap_of(await push(server.client, newer[len(log) :] or b"x" * src.frame,
                                 offset=len(log))) == here  # fmt: skip
        assert wal_bytes_on_disk(server) == on_disk

        at = here["offset"]
        rest = await pushed(server.client, more[at:], offset=at)
        assert rest["commits"] == 2
        await pushed(server.client, newer, after_lsn=rest["last_lsn"])
        await check_content(server, src.image(), page_size=4096)


async def test_only_whole_transactions_are_taken(server: ServerProcess, tmp_path):
    await create(server.client, page_size=512)
    with source(tmp_path / "src", page_size=512) as src:
        src.grow(4)
        whole = src.log()
        src.grow(30)
        log = src.log()
        assert len(log) - len(whole) > 4 * src.frame
        for cut in (0, 5, 31, 32, 33, 32 + src.frame // 2):  # nothing whole yet
            answer = await pushed(server.client, log[:cut])
            assert (answer["accepted_offset"], answer["frames"], answer["commits"]) == (0, 0, 0)
            assert answer["first_lsn"] is None
        assert not wal_bytes_on_disk(server)
        for cut in (1, src.frame, 2 * src.frame + 17):  # torn behind a commit
            answer = await pushed(server.client, log[: len(whole) + cut])
            assert (answer["accepted_offset"], answer["commits"]) in {(len(whole), 2),
                                                                      (len(whole), 0)}  # fmt: skip
        torn = bytearray(log)
        torn[-1] ^= 1  # the commit frame itself: nothing of its transaction is proven
        answer = await pushed(server.client, bytes(torn[len(whole) :]), offset=len(whole))
        assert (answer["accepted_offset"], answer["frames"]) == (len(whole), 0)
        answer = await pushed(server.client, log[len(whole) :], offset=len(whole))
        assert answer["accepted_offset"] == len(log)
        await check_content(server, src.image(), page_size=512)


async def test_an_uncommitted_tail_is_left(server: ServerProcess, tmp_path):
    await create(server.client, page_size=512)
    with source(tmp_path / "src", page_size=512) as src:
        committed, image = len(src.log()), src.image()
        src.run("BEGIN")
        src.connection.executemany(
            "INSERT INTO t (x) VALUES (randomblob(?))", [(400,)] * 200
        )  # more than the cache holds
        log = src.log()
        assert len(log) > committed + 50 * src.frame
        answer = await pushed(server.client, log)
        assert (answer["accepted_offset"], answer["page_count"]) == (committed, len(image) // 512)
        await check_content(server, image, page_size=512)
        src.run("COMMIT")
        log = src.log()
        rest = await pushed(server.client, log[committed:], offset=committed)
        assert rest["commits"] == 1
        await check_content(server, src.image(), page_size=512)


async def test_frames_of_an_older_log_end_the_log(server: ServerProcess, tmp_path):
    await create(server.client)
    with source(tmp_path / "src") as src:
        src.grow(40)
        first = await pushed(server.client, src.log())
        src.run("PRAGMA wal_checkpoint(RESTART)")
        src.run("INSERT INTO t (x) VALUES (1)")  # over the beginning of the old log
        log = src.log()
        answer = await pushed(server.client, log, after_lsn=first["last_lsn"])
        assert answer["accepted_offset"] < len(log)
        assert answer["commits"] == 1
        await check_content(server, src.image(), page_size=4096)


async def test_a_bad_frame_before_a_commit_refuses_the_body(server: ServerProcess, tmp_path):
    await create(server.client, page_size=512)
    with source(tmp_path / "src", page_size=512) as src:
        for _ in range(5):
            src.grow(3)
        log = src.log()
        frames = (len(log) - 32) // src.frame
        for frame in (1, 2, frames // 2, frames - 1):
            damaged = bytearray(log)
            damaged[32 + (frame - 1) * src.frame + 24 + 77] ^= 0x10
            answer = await push(server.client, bytes(damaged))
            assert (answer.status_code, answer.json()["code"]) == (400, "wal_invalid")
            assert answer.json()["frame"] == frame
            assert not wal_bytes_on_disk(server)
        damaged = bytearray(log)
        damaged[9] ^= 1  # its header
        answer = await push(server.client, bytes(damaged))
        assert (answer.status_code, answer.json()["code"]) == (400, "wal_invalid")
        assert answer.json()["frame"] == 0
        await pushed(server.client, log)
        await check_content(server, src.image(), page_size=512)


async def test_pages_of_another_size_are_refused(server: ServerProcess, tmp_path):
    await create(server.client, page_size=4096)
    with source(tmp_path / "src", page_size=512) as src:
        answer = await push(server.client, src.log())
        assert (answer.status_code, answer.json()["code"]) == (409, "page_size_mismatch")
        assert (answer.json()["stored"], answer.json()["sent"]) == (4096, 512)
        answer = await server.client.put(f"{DB}/image", content=src.image())
        assert (answer.status_code, answer.json()["code"]) == (409, "page_size_mismatch")
        assert not wal_bytes_on_disk(server)


async def test_a_database_that_shrinks_and_grows_again(make_server: MakeServer, tmp_path):
    server = make_server()
    await server.start()
    await create(server.client, page_size=512, chunk_bytes=65536)
    with source(tmp_path / "src", page_size=512, auto_vacuum=2) as src:
        log = b""

        async def sync() -> None:
            nonlocal log
            at = len(log)
            log = src.log()
            answer = await pushed(server.client, log[at:], offset=at)
            assert answer["accepted_offset"] == len(log)
            expected = src.image()
            assert StoredWal(server, 512).image(512) == expected
            await check_content(server, expected, page_size=512)

        src.grow(200, width=400)
        await sync()
        grown = len(src.image())
        src.run("DELETE FROM t WHERE id > 20", "VACUUM")
        await sync()
        assert len(src.image()) < grown // 2
        src.run("CREATE TABLE u (x)")
        await sync()
        src.grow(100, width=450)
        await sync()
        src.run("DELETE FROM t WHERE id > 50", "PRAGMA incremental_vacuum(30)")
        src.grow(10)
        src.run("VACUUM")
        src.grow(60)
        await sync()
        await server.kill9()
        await server.start()
        await check_content(server, src.image(), page_size=512)
        src.grow(3)
        await sync()


async def test_a_transaction_larger_than_what_bodies_may_hold(make_server: MakeServer, tmp_path):
    server = make_server(settings={"BOP_BODY_MEMORY_BYTES": str(MIB)})
    await server.start()
    await create(server.client, chunk_bytes=4 * MIB)
    with source(tmp_path / "src") as src:
        src.run("BEGIN")
        for _ in range(48):
            src.run("INSERT INTO t (x) VALUES (randomblob(1000000))")
        src.run("COMMIT")
        log = src.log()
        assert len(log) > 48_000_000
        before = server.rss_peak_bytes()
        answer = await pushed(server.client, log)
        assert (answer["accepted_offset"], answer["commits"]) == (len(log), 2)
        assert server.rss_peak_bytes() - before < 32 * MIB
        assert len(wal_bytes_on_disk(server)) > 10  # over many segments
        await check_content(server, src.image(), page_size=4096)
        await server.kill9()
        await server.start()
        await check_content(server, src.image(), page_size=4096)


async def switch_checkpoints_off(client: httpx.AsyncClient) -> None:
    """A WAL that nears its budget is checkpointed by itself, and changes."""
    answer = await client.patch(
        "/admin/tenants/acme/feature-flags", json={"enable_checkpoints": False}
    )
    assert answer.status_code == 200, answer.text


async def test_what_can_never_fit_is_refused(make_server: MakeServer, tmp_path):
    server = make_server(settings={"BOP_WAL_BUDGET_BYTES": "300000", "BOP_MAX_WAL_BYTES": "800000"})
    await server.start()
    await create(server.client)
    with source(tmp_path / "src") as src:
        src.grow(100, width=2000)
        src.grow(50, width=2000)
        log = src.log()
        assert 300_000 < len(log) < 800_000
        # whole transactions that fit are taken; the next call goes on there
        answer = await pushed(server.client, log)
        assert answer["accepted_offset"] < len(log)
        at = answer["accepted_offset"]
        # … once there is room again
        await checkpoint(server.client)
        await switch_checkpoints_off(server.client)
        rest = await pushed(server.client, log[at:], offset=at)
        assert rest["accepted_offset"] == len(log)
        await check_content(server, src.image(), page_size=4096)

        on_disk = wal_bytes_on_disk(server)
        src.grow(1, width=320_000)
        more = src.log()
        answer = await push(server.client, more[len(log) :], offset=len(log))
        assert (answer.status_code, answer.json()["code"]) == (413, "transaction_too_large")
        assert answer.json()["wal_budget_bytes"] == 300_000
        answer = await push(server.client, b"x" * 800_001)
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        assert wal_bytes_on_disk(server) == on_disk


async def test_the_other_engine_takes_no_pages(server: ServerProcess):
    await server.client.put(DB, json={"engine": "append_only"})
    for answer in (
        await push(server.client, b"x"),
        await server.client.put(f"{DB}/image", content=b"x"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (409, "wrong_engine")
    missing = await server.client.post("/tenants/acme/databases/other/wal?offset=0", content=b"")
    assert (missing.status_code, missing.json()["code"]) == (404, "database_not_found")
    answer = await server.client.post(f"{DB}/wal", content=b"")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_the_same_bytes_at_once_are_stored_once(server: ServerProcess, tmp_path):
    await create(server.client, page_size=512)
    with source(tmp_path / "src", page_size=512) as src:
        src.grow(50)
        log = src.log()
        answers = await asyncio.gather(*(pushed(server.client, log) for _ in range(8)))
        assert {answer["accepted_offset"] for answer in answers} == {len(log)}
        assert sorted(answer["commits"] for answer in answers) == [0] * 7 + [2]
        stored = StoredWal(server, 512)
        assert (stored.requests, len(stored.lsns)) == (1, (len(log) - 32) // src.frame)
        await check_content(server, src.image(), page_size=512)


async def test_a_body_that_breaks_off_stores_nothing(server: ServerProcess, tmp_path):
    await create(server.client, page_size=512)
    with source(tmp_path / "src", page_size=512) as src:
        src.grow(50)
        log, image = src.log(), src.image()

        async def breaks_off(data: bytes) -> AsyncIterator[bytes]:
            yield data[: len(data) - 1]
            raise ConnectionAbortedError

        for method, path, data in (
            ("POST", f"{DB}/wal?offset=0", log),
            ("PUT", f"{DB}/image", image),
        ):
            with pytest.raises(ConnectionAbortedError):
                await server.client.request(
                    method, path, content=breaks_off(data),
                    headers={"Content-Length": str(len(data))},
                )  # fmt: skip
        assert (await server.client.get(DB)).json()["next_lsn"] == 1
        assert not wal_bytes_on_disk(server)
        await pushed(server.client, log)
        await check_content(server, image, page_size=512)


# --- images


async def put_image(client: httpx.AsyncClient, image: bytes, **position: int) -> dict[str, Any]:
    answer = await client.put(f"{DB}/image", params=position, content=image)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("page_size", SIZES)
async def test_an_image_stores_only_pages_that_differ(server: ServerProcess, tmp_path, page_size):
    await create(server.client, page_size=page_size)
    with source(tmp_path / "src", page_size=page_size) as src:
        src.grow(300)
        image = src.image()
        pages = len(image) // page_size
        first = await put_image(server.client, image)
        assert first == {"lsn": pages, "page_count": pages, "changed_pages": pages}
        await check_content(server, image, page_size=page_size)

        again = await put_image(server.client, image)  # nothing differs; it takes an LSN anyhow
        assert again == {"lsn": pages + 1, "page_count": pages, "changed_pages": 1}

        src.run("UPDATE t SET x = randomblob(length(x)) WHERE id = 5")
        changed = src.image()
        differing = sum(
            changed[at : at + page_size] != image[at : at + page_size]
            for at in range(0, len(changed), page_size)
        )
        third = await put_image(server.client, changed)
        assert third["changed_pages"] == differing < max(pages, 2)
        await check_content(server, changed, page_size=page_size)

        src.run("DELETE FROM t WHERE id > 10", "VACUUM")
        small = src.image()
        await put_image(server.client, small)
        await check_content(server, small, page_size=page_size)
        src.grow(500)
        await put_image(server.client, src.image())
        await check_content(server, src.image(), page_size=page_size)
        assert StoredWal(server, page_size).image(page_size) == src.image()


async def test_a_log_goes_on_at_an_images_position(make_server: MakeServer, tmp_path):
    server = make_server()
    await server.start()
    await create(server.client)
    with source(tmp_path / "src") as src:
        src.grow(30)
        log = src.log()
        position = {
            "offset": len(log), "salt1": salts(log)[0], "salt2": salts(log)[1],
            "checksum1": checksums(log, len(log), src.frame)[0],
            "checksum2": checksums(log, len(log), src.frame)[1],
        }  # fmt: skip
        stored = await put_image(server.client, src.image(), **position)
        gap = gap_of(await push(server.client, b"x" * src.frame, offset=32 + 9 * src.frame))
        assert gap == position | {"last_lsn": stored["lsn"]}
        assert (await pushed(server.client, log))["frames"] == 0  # the image includes it
        await server.kill9()
        await server.start()
        src.grow(5)
        more = src.log()
        answer = await pushed(server.client, more[len(log) :], offset=len(log))
        assert answer["first_lsn"] == stored["lsn"] + 1
        await check_content(server, src.image(), page_size=4096)

        # a wrong chain is found at once
        wrong = position | {"checksum1": position["checksum1"] ^ 1}
        await put_image(server.client, src.image(), **wrong)
        gap_of(await push(server.client, more[len(log) :], offset=len(log)))


async def test_after_an_image_without_a_position_a_log_starts_anew(server: ServerProcess, tmp_path):
    await create(server.client)
    with source(tmp_path / "src") as src:
        src.grow(30)
        log = src.log()
        await pushed(server.client, log)
        src.grow(1)
        src.restart_log()
        image = src.image()
        stored = await put_image(server.client, image)
        src.grow(5)
        newer = src.log()
        nowhere = dict.fromkeys(GAP_FIELDS) | {"last_lsn": stored["lsn"]}
        assert gap_of(await push(server.client, newer)) == nowhere
        assert gap_of(await push(server.client, newer[32:], offset=32)) == nowhere
        answer = await pushed(server.client, newer, after_lsn=stored["lsn"])
        assert answer["accepted_offset"] == len(newer)
        assert (await pushed(server.client, log))["frames"] == 0  # known from before the image
        await check_content(server, src.image(), page_size=4096)


@pytest.mark.parametrize("when", ["at_the_log_s_place", "before_it"])
async def test_after_an_image_without_a_position_the_same_log_may_be_sent_again(
    server: ServerProcess, tmp_path, when
):
    """An application that never lets its log restart, and asserts what `after_lsn` says."""
    await create(server.client)
    with source(tmp_path / "src") as src:
        src.grow(30)
        image = src.image()
        if when == "before_it":
            src.grow(10)
        await pushed(server.client, src.log())
        stored = await put_image(server.client, image)
        await check_content(server, image, page_size=4096)
        if when != "before_it":
            src.grow(10)
            assert gap_of(await push(server.client, src.log()))["offset"] is None
        log = src.log()
        answer = await pushed(server.client, log, after_lsn=stored["lsn"])
        assert (answer["first_lsn"], answer["accepted_offset"]) == (stored["lsn"] + 1, len(log))
        await check_content(server, src.image(), page_size=4096)
        again = await pushed(server.client, log, after_lsn=stored["lsn"])  # its answer was lost
        assert again["frames"] == 0
        src.grow(5)
        await pushed(server.client, src.log()[len(log) :], offset=len(log))
        await check_content(server, src.image(), page_size=4096)


async def test_what_is_no_image_is_refused(server: ServerProcess, tmp_path):
    await create(server.client, page_size=512)
    with source(tmp_path / "src", page_size=512) as src:
        src.grow(5)
        image = src.image()
        await put_image(server.client, image)
        on_disk = wal_bytes_on_disk(server)
        other_magic = b"SQLite format 4\0" + image[16:]
        for bad in (b"", image[:99], other_magic, image[:-1], image + bytes(512), image[:-512]):
            answer = await server.client.put(f"{DB}/image", content=bad)
            assert (answer.status_code, answer.json()["code"]) == (400, "image_invalid"), bad[:20]
        for some in ({"salt1": 1}, {"salt1": 1, "salt2": 2, "checksum1": 3, "checksum2": 4}):
            answer = await server.client.put(f"{DB}/image", params=some, content=image)
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        five = {"salt1": 1, "salt2": 2, "checksum1": 3, "checksum2": 4}
        for offset in (0, 31, 33, 32 + 511):
            answer = await server.client.put(
                f"{DB}/image", params=five | {"offset": offset}, content=image
            )
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), offset
        assert wal_bytes_on_disk(server) == on_disk
        await check_content(server, image, page_size=512)


async def test_an_image_too_large_for_the_budget_is_refused(make_server: MakeServer, tmp_path):
    server = make_server(
        settings={"BOP_WAL_BUDGET_BYTES": "200000", "BOP_MAX_IMAGE_BYTES": "9" * 7}
    )
    await server.start()
    await create(server.client)
    await switch_checkpoints_off(server.client)
    with source(tmp_path / "src") as src:
        src.grow(30, width=3000)
        await put_image(server.client, src.image())
        on_disk = wal_bytes_on_disk(server)
        src.grow(200, width=3000)
        answer = await server.client.put(f"{DB}/image", content=src.image())
        assert (answer.status_code, answer.json()["code"]) == (413, "transaction_too_large")
        answer = await server.client.put(f"{DB}/image", content=src.image() + bytes(10_000_000))
        assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        assert wal_bytes_on_disk(server) == on_disk


# --- crashes


@pytest.mark.parametrize(
    "failpoint", ["wal.before_write", "wal.mid_write", "wal.after_write", "wal.after_fsync"]
)
async def test_a_crash_while_a_body_is_stored(make_server: MakeServer, tmp_path, failpoint):
    server = make_server()
    await server.start()
    await create(server.client, page_size=512, chunk_bytes=65536)
    with source(tmp_path / "src", page_size=512) as src:
        src.grow(10)
        log = src.log()
        first = await pushed(server.client, log)
        src.grow(400)  # over several segments
        more = src.log()
        await server.restart(failpoints=kill_at(failpoint))
        with pytest.raises(httpx.TransportError):
            await push(server.client, more[len(log) :], offset=len(log))
        await server.wait_exit()
        await server.start(failpoints={})
        shown = (await server.client.get(DB)).json()
        assert shown["health"]["state"] == "ok"
        assert shown["next_lsn"] in {first["last_lsn"] + 1, (len(more) - 32) // src.frame + 1}
        # the client had no answer: it sends the same again, whichever it was
        answer = await pushed(server.client, more[len(log) :], offset=len(log))
        assert answer["accepted_offset"] == len(more)
        await check_content(server, src.image(), page_size=512)
        assert StoredWal(server, 512).requests == 2


async def test_a_random_writer_survives_kills(make_server: MakeServer, tmp_path):
    seed = random.Random().randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    server = make_server()
    await server.start()
    await create(server.client, page_size=512, chunk_bytes=65536)
    with source(tmp_path / "src", page_size=512, auto_vacuum=chance.choice([0, 1, 2])) as src:
        salts_now, at, last_lsn = None, 0, 0
        for _ in range(40):
            match chance.randrange(7):
                case 0:
                    src.run("DELETE FROM t WHERE id % 3 = 0")
                case 1:
                    src.run("VACUUM")
                case 2:
                    src.run("UPDATE t SET x = randomblob(length(x)) WHERE id % 5 = 0")
                case _:
                    src.grow(chance.randrange(1, 40), width=chance.choice([20, 400, 3000]))
            if chance.random() < 0.2 and salts_now is not None and at == len(src.log()):
                src.restart_log()
                src.grow(1)
            log = src.log()
            if salts(log) != salts_now:
                salts_now, at = salts(log), 0
            cut = chance.randrange(at, len(log) + 1) if chance.random() < 0.3 else len(log)
            answer = await pushed(
                server.client, log[at:cut], offset=at, **({} if at else {"after_lsn": last_lsn})
            )
            at = answer["accepted_offset"]
            last_lsn = answer["last_lsn"] or last_lsn
            if chance.random() < 0.15:
                await server.kill9()
                await server.start()
            if at == len(log):
                await check_content(server, src.image(), page_size=512)
        rest = src.log()
        if at < len(rest):
            await pushed(server.client, rest[at:], offset=at)
        await check_content(server, src.image(), page_size=512)
