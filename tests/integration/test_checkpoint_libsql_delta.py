"""A real SQLite database through WAL, checkpoints and back: deltas, pages, images, restores."""

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import pytest
from aiobotocore.session import get_session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.core.formats.sqlite_wal import from_big_endian
from tests.conftest import MakeServer
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess

MIB = 1024 * 1024
PAGE = 4096
PER_CHUNK = MIB // PAGE
NUMBERS = count(1)
APP = "/tenants/acme/databases/app"


@pytest.fixture
def bucket(seaweed: SeaweedS3) -> str:
    return seaweed.bucket()


def s3_settings(seaweed: SeaweedS3, bucket: str) -> dict[str, str]:
    return {
        "BOP_REMOTE_URL": f"s3://{bucket}/prod",
        "BOP_S3_ENDPOINT_URL": seaweed.endpoint,
        "BOP_S3_REGION": seaweed.region,
        **seaweed.environment(),
    }


class Source:
    """An application's database, sent on by hand: its log from where that was left, or an image."""

    def __init__(self, path: Path, *, page_size: int = PAGE, auto_vacuum: int = 0) -> None:
        self.path = path
        self.page_size = page_size
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute(f"PRAGMA page_size = {page_size}")
        self.connection.execute(f"PRAGMA auto_vacuum = {auto_vacuum}")
        self.connection.execute("PRAGMA journal_mode = WAL")
        self.connection.execute("PRAGMA wal_autocheckpoint = 0")
        self.connection.execute("PRAGMA synchronous = OFF")
        self.app = APP
        self.offset = 0
        self.last_lsn = 0

    @property
    def log(self) -> bytes:
        path = self.path.with_name(self.path.name + "-wal")
        return path.read_bytes() if path.exists() else b""

    def copy(self) -> bytes:
        """The database as a file, log included."""
        target = self.path.with_name("copy")
        for suffix in ("", "-wal"):
            source = self.path.with_name(self.path.name + suffix)
            if source.exists():
                shutil.copyfile(source, f"{target}{suffix}")
        with closing(sqlite3.connect(target)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        data = target.read_bytes()
        for leftover in target.parent.glob("copy*"):
            leftover.unlink()
        return data

    def fold(self) -> None:
        """SQLite's own checkpoint: the next log begins anew."""
        assert self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        self.offset = 0

    async def send_image(self, client: httpx.AsyncClient) -> dict:
        self.fold()
        answer = await client.put(f"{self.app}/image", content=self.path.read_bytes())
        assert answer.status_code == 200, answer.text
        self.last_lsn = answer.json()["lsn"]
        return answer.json()

    async def send_log(self, client: httpx.AsyncClient) -> dict:
        body = self.log[self.offset :]
        params = {"offset": self.offset}
        if self.offset == 0:
            params["after_lsn"] = self.last_lsn
        answer = await client.post(f"{self.app}/wal", params=params, content=body)
        assert answer.status_code == 200, answer.text
        stored = answer.json()
        self.offset = stored["accepted_offset"]
        self.last_lsn = stored["last_lsn"] or self.last_lsn
        return stored


@contextmanager
def source_at(path: Path, *, page_size: int = PAGE, auto_vacuum: int = 0) -> Iterator[Source]:
    source = Source(path, page_size=page_size, auto_vacuum=auto_vacuum)
    try:
        yield source
    finally:
        source.connection.close()


async def create(client: httpx.AsyncClient, **fields: object) -> None:
    answer = await client.put(APP, json={"engine": "libsql", "page_size": PAGE, **fields})
    assert answer.status_code == 201, answer.text


async def checkpoint(client: httpx.AsyncClient, database: str = "app") -> dict:
    answer = await client.post("/checkpoints", json={"tenant": "acme", "database": database})
    assert answer.status_code == 202, answer.text
    job = (await client.get(f"/checkpoints/{answer.json()['id']}?wait=60")).json()
    assert job["state"] == "completed", job
    return job["result"]


async def image(client: httpx.AsyncClient, app: str = APP, **params: object) -> bytes:
    answer = await client.get(f"{app}/image", params=params)
    assert answer.status_code == 200, answer.text
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    return answer.content


async def page(client: httpx.AsyncClient, page_no: int, **params: object) -> httpx.Response:
    answer = await client.get(f"{APP}/pages/{page_no}", params=params)
    assert answer.status_code == 200, answer.text
    return answer


async def check_pages(
    client: httpx.AsyncClient, content: bytes, numbers: list[int], **params: object
) -> set[str]:
    """Each is what the file has there. Returns the tiers they came from."""
    tiers = set()
    for number in numbers:
        answer = await page(client, number, **params)
        assert answer.content == content[(number - 1) * PAGE : number * PAGE], number
        tiers.add(answer.headers["Bop-Tier"])
    return tiers


def fill(source: Source, *, pages: int) -> None:
    """A table with a row per leaf page, in page order."""
    db, shapes = source.connection, random.Random(5)
    db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x)")
    row = 0
    while db.execute("PRAGMA page_count").fetchone()[0] < pages:
        rows = [(row + n, shapes.randbytes(1500) + b"text " * 300) for n in range(64)]
        db.execute("BEGIN")
        db.executemany("INSERT INTO t VALUES (?, ?)", rows)
        db.execute("COMMIT")
        row += 64


def pages_of_log(log: bytes) -> list[int]:
    frames = np.frombuffer(log[32:], dtype=np.uint8).reshape(-1, 24 + PAGE)
    return from_big_endian(frames[:, :4].copy().view("<u4")[:, 0]).tolist()


async def test_checkpoint_libsql_delta(
    make_server: MakeServer, seaweed: SeaweedS3, bucket: str, tmp_path: Path
):
    settings_of = s3_settings(seaweed, bucket)
    server = make_server(settings=settings_of)
    await server.start()
    client = server.client
    await create(client, chunk_bytes=MIB)
    with source_at(tmp_path / "app.db") as source:
        fill(source, pages=10 * PER_CHUNK - 80)
        await source.send_image(client)
        first = source.copy()
        pages = len(first) // PAGE
        assert 9 * PER_CHUNK < pages <= 10 * PER_CHUNK
        result = await checkpoint(client)
        assert [(one["chunk_id"], one["action"]) for one in result["chunks"]] == [
            (chunk_id, "rewrite_base") for chunk_id in range(10)
        ]

        # 100 rows of chunk 3, each on a page of its own: interior pages stay as they are.
        middle = 3 * PER_CHUNK + 20
        db = source.connection
        db.execute("BEGIN")
        for row in range(middle, middle + 100):
            (old,) = db.execute("SELECT x FROM t WHERE id = ?", (row,)).fetchone()
            new = old[:100] + b"touched!" + old[108:]
            db.execute("UPDATE t SET x = ? WHERE id = ?", (new, row))
        db.execute("COMMIT")
        touched = sorted(set(pages_of_log(source.log)))
        assert len(touched) == 100
        assert {(number - 1) // PER_CHUNK for number in touched} == {3}
        stored = await source.send_log(client)
        assert (stored["frames"], stored["commits"]) == (100, 1)
        second = source.copy()
        assert first != second
        assert await check_pages(client, second, touched[:5]) == {"wal"}

        result = await checkpoint(client)
    (delta,) = result["chunks"]
    assert (delta["chunk_id"], delta["action"], delta["pages"]) == (3, "create_delta", 100)
    assert delta["bytes"] < MIB
    assert result["bytes_uploaded"] == delta["bytes"]
    assert "/delta-3-" in delta["blob_key"]

    async with get_session().create_client(
        "s3",
        endpoint_url=seaweed.endpoint,
        region_name=seaweed.region,
        aws_access_key_id=seaweed.access_key,
        aws_secret_access_key=seaweed.secret_key,
    ) as s3:
        head = await s3.head_object(Bucket=bucket, Key=f"prod/{delta['blob_key']}")
        assert head["ContentLength"] == delta["bytes"]

    changes = (await client.get("/debug/manifest/change_log?limit=1000")).json()["items"]
    (row,) = [
        op["row"] for change in changes for op in change["ops"] if op["type"] == "UpsertChunkDelta"
    ]
    assert (row["chunk_id"], row["generation"], row["count"]) == (3, 2, 100)
    newest = (await client.get(f"{APP}/generations")).json()["items"][-1]
    assert (newest["generation"], newest["delta_chunks"]) == (2, 1)
    fsck = (await client.get("/debug/manifest/fsck")).json()
    assert fsck["findings"] == []

    others = random.Random(1).sample(range(1, pages + 1), 60)

    async def check_everything(client: httpx.AsyncClient) -> set[str]:
        tiers = await check_pages(client, second, touched)
        tiers |= await check_pages(client, second, others)
        tiers |= await check_pages(client, first, [*touched[::7], *others[::7]], generation=1)
        assert await image(client) == await image(client, generation=2) == second
        assert await image(client, generation=1) == first
        return tiers

    assert await check_everything(client) == {"local", "page_cache"}

    await server.terminate()
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.start()
    assert await check_everything(server.client) == {"remote", "page_cache"}
    await server.kill9()

    recovered = make_server("recovered", settings=settings_of)
    await recovered.start(wait="launched", arguments=("recover",))
    assert await recovered.wait_exit() == 0, recovered.log_tail()
    await recovered.start()
    assert await check_everything(recovered.client) == {"remote", "page_cache"}


# --- random transactions


CHANGES = st.one_of(
    st.tuples(st.just("insert"), st.integers(1, 60), st.integers(1, 3000)),
    st.tuples(st.just("update"), st.integers(1, 40), st.integers(1, 3000)),
    st.tuples(st.just("delete"), st.integers(0, 9), st.integers(1, 10)),
    st.tuples(st.just("blob"), st.integers(1, 3), st.integers(50_000, 300_000)),
    st.tuples(st.just("table"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("vacuum"), st.just(0), st.just(0)),
    st.tuples(st.just("fold"), st.just(0), st.just(0)),
)
STEPS = st.lists(
    st.tuples(
        st.lists(CHANGES, min_size=1, max_size=4),
        st.sampled_from(["log", "log", "log", "image"]),
        st.sampled_from(["", "checkpoint", "checkpoint", "restart", "cold"]),
    ),
    min_size=3,
    max_size=9,
)


def change(source: Source, kind: str, number: int, size: int, shapes: random.Random) -> None:
    db = source.connection
    if kind == "fold":
        if source.offset == len(source.log):  # only what was sent may be folded
            source.fold()
        return
    if kind == "vacuum":
        db.execute("VACUUM")
        return
    db.execute("BEGIN")
    write(db, kind, number, size, shapes)
    db.execute("COMMIT")


def write(db: sqlite3.Connection, kind: str, number: int, size: int, shapes: random.Random) -> None:
    match kind:
        case "insert":
            rows = [(shapes.randbytes(size // 2) + bytes(size // 2),) for _ in range(number)]
            db.executemany("INSERT INTO t (x) VALUES (?)", rows)
        case "update":
            ids = [one for (one,) in db.execute("SELECT id FROM t")]
            for row in shapes.sample(ids, min(number, len(ids))):
                db.execute("UPDATE t SET x = ? WHERE id = ?", (shapes.randbytes(size), row))
        case "delete":
            db.execute("DELETE FROM t WHERE id % 10 >= ? AND id % 10 < ?", (number, number + size))
        case "blob":
            db.executemany("INSERT INTO t (x) VALUES (?)", [(shapes.randbytes(size),)] * number)
        case "table":
            db.execute(f"CREATE TABLE IF NOT EXISTS t{number} AS SELECT * FROM t")
        case "drop":
            db.execute(f"DROP TABLE IF EXISTS t{number}")


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    steps=STEPS,
    page_size=st.sampled_from([512, 1024, 4096, 65536]),
    auto_vacuum=st.sampled_from([0, 0, 1, 2]),
    compression=st.sampled_from(["zstd", "lz4", "none"]),
    seed=st.integers(0, 2**32),
)
async def test_any_generation_of_any_history_comes_back(
    server: ServerProcess, tmp_path: Path, steps, page_size, auto_vacuum, compression, seed
):
    """Images are compared byte by byte with what SQLite itself makes of its file and log."""
    shapes, name = random.Random(seed), f"db-{next(NUMBERS)}"
    app = f"/tenants/acme/databases/{name}"
    fields = {"page_size": page_size, "chunk_bytes": 65536 * 2, "compression": compression}
    answer = await server.client.put(app, json={"engine": "libsql", **fields})
    assert answer.status_code == 201, answer.text
    history: dict[int, bytes] = {}
    with source_at(tmp_path / f"{name}.db", page_size=page_size, auto_vacuum=auto_vacuum) as source:
        source.app = app
        source.connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x)")
        await source.send_log(server.client)
        for changes, way, then in steps:
            for kind, number, size in changes:
                change(source, kind, number, size, shapes)
            if way == "image":
                await source.send_image(server.client)
            elif source.log:
                await source.send_log(server.client)
            sent = source.copy()
            if then == "checkpoint":
                result = await checkpoint(server.client, name)
                history[result["generation"]] = sent
            elif then:
                await start_again(server, cold=then == "cold")
            assert await image(server.client, app) == sent
            await check_some(server.client, app, sent, page_size, shapes)
    for generation, content in history.items():
        assert await image(server.client, app, generation=generation) == content
        await check_some(server.client, app, content, page_size, shapes, generation=generation)


async def start_again(server: ServerProcess, *, cold: bool) -> None:
    """After `kill -9`, or in order and without a local copy of any blob."""
    if cold:
        await server.terminate()
        shutil.rmtree(server.data_dir / "hot_cache")
    else:
        await server.kill9()
    await server.start()


async def check_some(
    client: httpx.AsyncClient,
    app: str,
    content: bytes,
    page_size: int,
    shapes: random.Random,
    **params: object,
) -> None:
    """Some pages, and some ranges of the image."""
    pages = len(content) // page_size
    for number in shapes.sample(range(1, pages + 1), min(5, pages)):
        answer = await client.get(f"{app}/pages/{number}", params=params)
        assert answer.status_code == 200, answer.text
        assert answer.content == content[(number - 1) * page_size : number * page_size]
    answer = await client.get(f"{app}/pages/{pages + 1}", params=params)
    assert (answer.status_code, answer.json()["code"]) == (404, "page_not_found")
    for _ in range(3):
        first = shapes.randrange(len(content))
        last = shapes.randrange(first, len(content))
        answer = await client.get(
            f"{app}/image", params=params, headers={"Range": f"bytes={first}-{last}"}
        )
        assert answer.status_code == 206
        assert answer.content == content[first : last + 1]
        assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{len(content)}"
