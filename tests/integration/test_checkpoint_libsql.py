"""Checkpoints of libsql databases: bases, deltas, merges and drops give back every generation."""

import random
import shutil
import struct

import httpx
import pytest

from app.container import fsck
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.failpoints import kill_at
from tests.helpers.server import ServerProcess
from tests.helpers.sqlite_logs import log_of, wal_database

PAGE = 4096
PER_CHUNK = 16
DATABASE = "/tenants/acme/databases/app"


class Image:
    """A file that passes for a SQLite database: its header agrees with its size."""

    def __init__(self, shapes: random.Random, pages: int) -> None:
        self.shapes = shapes
        self.pages = [bytearray()] + [self.page() for _ in range(pages - 1)]
        self.pages[0] = bytearray(PAGE)

    def page(self) -> bytearray:
        """Half of it like all others."""
        return bytearray(self.shapes.randbytes(PAGE // 2) + b"row of text " * 170 + bytes(8))

    def touch(self, page_no: int) -> None:
        """A small change."""
        at = self.shapes.randrange(PAGE // 2, PAGE - 16)
        self.pages[page_no - 1][at : at + 8] = self.shapes.randbytes(8)

    def resize(self, pages: int) -> None:
        del self.pages[pages:]
        while len(self.pages) < pages:
            # Every other new page is one of zeros: older ones must not show through.
            new = bytearray(PAGE) if len(self.pages) % 2 else self.page()
            self.pages.append(new)

    def content(self) -> bytes:
        head = bytearray(PAGE)
        head[:16] = b"SQLite format 3\0"
        head[16:18] = struct.pack(">H", PAGE)
        head[18:20] = b"\x02\x02"
        head[21:24] = bytes((64, 32, 32))
        head[24:28] = head[92:96] = struct.pack(">I", 1)
        head[28:32] = struct.pack(">I", len(self.pages))
        self.pages[0] = head
        return b"".join(self.pages)


async def create(client: httpx.AsyncClient, **fields: object) -> None:
    body = {"engine": "libsql", "page_size": PAGE, "chunk_bytes": PAGE * PER_CHUNK, **fields}
    answer = await client.put(DATABASE, json=body)
    assert answer.status_code == 201, answer.text


async def put(client: httpx.AsyncClient, image: Image) -> bytes:
    content = image.content()
    answer = await client.put(f"{DATABASE}/image", content=content)
    assert answer.status_code == 200, answer.text
    return content


async def trigger(client: httpx.AsyncClient) -> str:
    answer = await client.post("/checkpoints", json={"tenant": "acme", "database": "app"})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


async def ended(client: httpx.AsyncClient, job_id: str) -> dict:
    job = (await client.get(f"/checkpoints/{job_id}?wait=60")).json()
    assert job["state"] == "completed", job
    return job["result"]


async def checkpoint(client: httpx.AsyncClient) -> dict:
    return await ended(client, await trigger(client))


async def image_at(client: httpx.AsyncClient, generation: int | None = None) -> bytes:
    params = {} if generation is None else {"generation": generation}
    answer = await client.get(f"{DATABASE}/image", params=params)
    assert answer.status_code == 200, answer.text
    return answer.content


def actions(result: dict) -> list[tuple[int, str]]:
    return [(chunk["chunk_id"], chunk["action"]) for chunk in result["chunks"]]


@pytest.fixture
async def server(make_server: MakeServer) -> ServerProcess:
    server = make_server()
    await server.start()
    return server


async def check_fsck(server: ServerProcess) -> None:
    await server.terminate()
    report = await fsck(Settings(data_dir=server.data_dir))
    assert report.findings == ()
    assert report.checked["blobs"] > 0


@pytest.mark.parametrize("compression", ["zstd", "lz4", "none"])
async def test_every_generation_comes_back(server: ServerProcess, compression: str):
    client, shapes = server.client, random.Random(3)
    await create(client, compression=compression)
    image = Image(shapes, 3 * PER_CHUNK)
    generations: dict[int, bytes] = {}
    seen: set[str] = set()
    for step in range(24):
        if step:
            kind = shapes.randrange(6)
            if kind == 0:
                image.resize(shapes.randrange(2, 5 * PER_CHUNK))
            if kind == 1:  # ends and grows again within one checkpoint
                before = len(image.pages)
                image.resize(max(2, before // 2))
                await put(client, image)
                image.resize(before)
            for _ in range(shapes.choice((1, 1, 3, 40))):
                image.touch(shapes.randrange(1, len(image.pages) + 1))
        content = await put(client, image)
        result = await checkpoint(client)
        generations[result["generation"]] = content
        seen.update(action for _, action in actions(result))
        assert await image_at(client) == content
    assert seen == {"rewrite_base", "create_delta", "drop"}
    for generation, content in generations.items():
        assert await image_at(client, generation) == content, generation
    await check_fsck(server)


async def test_a_small_change_is_a_small_delta_and_three_make_one(server: ServerProcess):
    client, shapes = server.client, random.Random(5)
    await create(client, compression="zstd")
    image = Image(shapes, 4 * PER_CHUNK)
    await put(client, image)
    first = await checkpoint(client)
    assert actions(first) == [(chunk, "rewrite_base") for chunk in range(4)]
    image.touch(20)  # once, for the header's page to change but once
    for number in range(4):
        image.touch(20 + number)
        await put(client, image)
        result = await checkpoint(client)
        assert actions(result) == [(1, "create_delta")]
        chunk = result["chunks"][0]
        assert chunk["bytes"] < PAGE
        # The fourth would pass three deltas: one takes the place of all.
        assert chunk["pages"] == (1 if number < 3 else 4)
        assert await image_at(client) == b"".join(map(bytes, image.pages))
    await check_fsck(server)


async def test_a_page_that_no_cache_has_takes_one_request_and_a_patched_one_two(
    server: ServerProcess,
):
    """Directories stay on the disk when the blobs go; without them it takes one more."""
    per_chunk = 512  # larger than what is fetched whole
    image = Image(random.Random(9), 2 * per_chunk)
    await create(server.client, chunk_bytes=per_chunk * PAGE)
    await put(server.client, image)
    await checkpoint(server.client)
    image.touch(5)
    content = await put(server.client, image)
    await checkpoint(server.client)

    async def requests(page_no: int) -> float:
        client = server.client
        before = await remote_gets(client)
        answer = await client.get(f"{DATABASE}/pages/{page_no}")
        assert answer.headers["Bop-Tier"] == "remote"
        assert answer.content == content[(page_no - 1) * PAGE : page_no * PAGE]
        return await remote_gets(client) - before

    for kept, whole, patched in ((True, 1, 2), (False, 2, 3)):
        for page_no, expected in ((per_chunk + 3, whole), (5, patched)):
            await server.terminate()
            shutil.rmtree(server.data_dir / "hot_cache")
            if not kept:
                shutil.rmtree(server.data_dir / "directories")
            await server.start()
            assert await requests(page_no) == expected
    await check_fsck(server)


async def remote_gets(client: httpx.AsyncClient) -> float:
    metrics = (await client.get("/metrics")).text
    return sum(
        float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        if line.startswith("remote_requests_total") and 'op="get' in line
    )


async def test_an_equal_image_publishes_no_page(server: ServerProcess):
    client = server.client
    await create(client)
    image = Image(random.Random(1), 20)
    content = await put(client, image)
    await checkpoint(client)
    await put(client, image)
    result = await checkpoint(client)
    assert (result["outcome"], result["generation"], result["chunks"]) == ("published", 2, [])
    assert await image_at(client, 2) == content
    status = (await client.get(DATABASE)).json()
    assert status["checkpointed_lsn"] == result["last_lsn"]


async def test_a_delta_that_may_not_be_is_a_rewrite(server: ServerProcess):
    server.settings["BOP_DELTA_BYTES_MAX"] = "0"
    await server.restart()
    client = server.client
    await create(client)
    image = Image(random.Random(1), 20)
    await put(client, image)
    await checkpoint(client)
    image.touch(18)
    await put(client, image)
    assert actions(await checkpoint(client)) == [(1, "rewrite_base")]


@pytest.mark.parametrize(
    "point",
    ["job.after_plan", "stage.after_file", "stage.after_intents", "upload.after_put",
     "cleanup.after_links", "publish.after_commit", "publish.after_document"],
)  # fmt: skip
async def test_a_killed_delta_goes_on_where_it_was(make_server: MakeServer, point: str):
    server, shapes = make_server(), random.Random(11)
    await server.start()
    await create(server.client, compression="zstd")
    image = Image(shapes, 3 * PER_CHUNK)
    before = await put(server.client, image)
    await checkpoint(server.client)
    image.touch(PER_CHUNK + 1)
    image.resize(2 * PER_CHUNK)
    after = await put(server.client, image)
    await server.restart(failpoints=kill_at(point))
    job_id = await trigger(server.client)
    await server.wait_exit()
    await server.start(failpoints={})
    result = await ended(server.client, job_id)
    assert actions(result) == [(0, "create_delta"), (1, "create_delta"), (2, "drop")]
    assert await image_at(server.client, 1) == before
    assert await image_at(server.client, 2) == after
    await check_fsck(server)


async def test_deltas_come_back_from_the_bucket_alone(make_server: MakeServer, tmp_path):
    remote = {"BOP_REMOTE_URL": f"file://{tmp_path / 'bucket'}"}
    server, shapes = make_server(settings=remote), random.Random(13)
    await server.start()
    await create(server.client, compression="zstd")
    image = Image(shapes, 4 * PER_CHUNK)
    contents = {}
    for generation in range(1, 7):
        contents[generation] = await put(server.client, image)
        await checkpoint(server.client)
        image.touch(PER_CHUNK + generation)
        if generation == 3:
            image.resize(2 * PER_CHUNK + 3)
    await server.terminate()
    other = make_server("other", settings=remote)
    await other.start(arguments=("recover",), wait="launched")
    assert await other.wait_exit() == 0, other.log_tail()
    await other.start()
    for generation, content in contents.items():
        assert await image_at(other.client, generation) == content
    assert await image_at(other.client) == contents[6]


async def test_a_log_goes_on_after_its_frames_were_published(server: ServerProcess, tmp_path):
    """The position in the application's log outlives the WAL that it was told with."""
    await create(server.client, compression="zstd")
    path = tmp_path / "app.db"
    with wal_database(path) as connection:
        connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x)")
        offset = 0
        for step in range(5):
            connection.execute("INSERT INTO t (x) VALUES (randomblob(50000))")
            connection.execute("UPDATE t SET x = randomblob(9) WHERE id = ?", (step,))
            answer = await server.client.post(
                f"{DATABASE}/wal", params={"offset": offset}, content=log_of(path)[offset:]
            )
            assert answer.status_code == 200, answer.text
            offset = answer.json()["accepted_offset"]
            assert offset == len(log_of(path))
            await checkpoint(server.client)
            assert (await server.client.get(DATABASE)).json()["wal_bytes"] == 0
            if step == 2:
                await server.restart()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = path.read_bytes()
    assert await image_at(server.client) == content
    await check_fsck(server)
