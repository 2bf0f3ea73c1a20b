"""History under everything at once, against a plain model (fault rows 37-39, 44; I3-I8, I14).

A Hypothesis state machine drives the real service: appends and images, checkpoints (and the merging
of small chunks that follows them), truncations, snapshots, forks, deletions, retention, collection,
crashes and restarts, for both engines. After each collection every retained thing reads back right,
and the store holds the blobs and documents of what is retained, and nothing else.
"""

import asyncio
import random
import struct
import uuid
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from app.container import fsck
from app.core.formats.cold_scan import FrameDecoder, FrameType
from app.settings import Settings
from tests.helpers.history_model import DatabaseModel, RetentionModel
from tests.helpers.launch import ForkServer
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS, frame, unframe

T = TypeVar("T")

STEPS_MIN = 2_000
EXAMPLES, STEPS = 8, 50
PAGE, CHUNK_BYTES = 512, 65_536
PAGES_MAX = 3 * CHUNK_BYTES // PAGE
DATABASES_MAX = 6
TRUNCATIONS = ("head", "tail")
ACTIONS = (
    *["append"] * 4, *["slow_log"] * 3, *["image"] * 5, *["checkpoint"] * 5, "head", "head", "tail",
    *["snapshot"] * 3, *["delete_snapshot"] * 2, *["fork"] * 3, "delete", *["retention"] * 3,
    *["collect"] * 2, "crash", "create", "read",
)  # fmt: skip
"""By weight."""


class World:
    """The service and its loop, for all examples; each has a tenant of its own."""

    def __init__(self, server: ServerProcess, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self._loop = loop
        self.done: Counter[str] = Counter()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        answer = self.run(self.server.client.request(method, url, **options))
        assert answer.status_code < 500 or answer.status_code == 507, (url, answer.text)
        return answer

    def job(self, answer: httpx.Response) -> dict[str, Any]:
        """The ended job that an answer 202 speaks of."""
        assert answer.status_code == 202, answer.text
        job = answer.json()
        while job["state"] in {"pending", "in_flight"}:
            job = self.request("GET", f"{answer.headers['Location']}?wait=30").json()
        return job

    def settle(self) -> None:
        """No job waits or runs."""

        async def is_idle() -> bool:
            found = await self.server.client.get("/debug/checkpoint/active_jobs")
            return found.json()["items"] == []

        self.run(wait_until(is_idle, timeout=30, describe="idle jobs"))

    @property
    def remote(self) -> Path:
        return self.server.data_dir / "remote"


def sqlite_file(pages: int, source: random.Random, before: bytes | None) -> bytes:
    """A file of that many pages with a header that SQLite would take; pages of `before` mostly
    stay as they were.
    """
    held = [] if before is None else [before[at : at + PAGE] for at in range(0, len(before), PAGE)]
    made = held[:pages] + [
        source.randbytes(40) * (PAGE // 40) + bytes(PAGE % 40) for _ in range(pages - len(held))
    ]
    for _ in range(source.randrange(1, 12)):
        made[source.randrange(pages)] = source.randbytes(PAGE // 2) + bytes(PAGE // 2)
    counter = source.randrange(1 << 31)
    head = bytearray(made[0])
    struct.pack_into(
        ">16sH6BII", head, 0, b"SQLite format 3\0", PAGE, 2, 2, 0, 64, 32, 32, counter, pages
    )
    struct.pack_into(">I", head, 92, counter)
    made[0] = bytes(head)
    return b"".join(made)


class HistoryMachine(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.tenant = f"t{uuid.uuid4().hex[:12]}"
        self.databases: dict[str, DatabaseModel] = {}
        self.named = 0
        self.source = random.Random(0)

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.source = random.Random(seed)
        for engine in ("append_only", "libsql"):
            self._create(engine)

    # --- helpers

    def path(self, name: str) -> str:
        return f"/tenants/{self.tenant}/databases/{name}"

    def pick(self, number: int, *, engine: str | None = None) -> DatabaseModel | None:
        found = [one for one in self.databases.values() if engine in {None, one.engine}]
        return found[number % len(found)] if found else None

    def note(self, what: str) -> None:
        self.world.done[what] += 1

    def _create(self, engine: str) -> None:
        name = self._new_name()
        body: dict[str, Any] = {
            "engine": engine,
            "chunk_bytes": CHUNK_BYTES,
            "compression": self.source.choice(("none", "zstd")),
        }
        if engine == "libsql":
            body["page_size"] = PAGE
        answer = self.world.request("PUT", self.path(name), json=body)
        assert answer.status_code == 201, answer.text
        self.databases[name] = DatabaseModel(name=name, engine=engine)  # type: ignore[arg-type]
        self.note("create")

    def _new_name(self) -> str:
        self.named += 1
        return f"d{self.named}"

    def generations_of(self, database: DatabaseModel) -> set[int]:
        url = f"{self.path(database.name)}/generations?limit=1000"
        return {item["generation"] for item in self.world.request("GET", url).json()["items"]}

    def sync_merges(self, database: DatabaseModel) -> None:
        """Takes note of the generations that merging small chunks published meanwhile."""
        self.world.settle()
        known = database.newest
        for number in sorted(each for each in self.generations_of(database) if each > known):
            database.publish_unchanged(number)
            self.note("merge")

    # --- what is done

    @rule(
        what=st.sampled_from(ACTIONS),
        which=st.integers(0, 99),
        number=st.integers(0, 999),
        flag=st.booleans(),
    )
    def act(self, what: str, which: int, number: int, flag: bool) -> None:  # noqa: C901 - a case each
        engine = {"append": "append_only", "slow_log": "append_only", "image": "libsql"}.get(what)
        database = self.pick(which, engine="append_only" if what in TRUNCATIONS else engine)
        match what:
            case "create":
                self.create("libsql" if flag else "append_only")
            case "crash":
                self.crash()
            case "collect":
                self.collect()
            case _ if database is None:
                pass
            case "append":
                self.append(database, 1 + number % 6, (0, 40, 3000)[number % 3])
            case "slow_log":
                self.slow_log(database, 2 + number % 3)
            case "image":
                self.put_image(database, 1 + number % PAGES_MAX, resize=flag)
            case "checkpoint":
                self.checkpoint(database)
            case "head" | "tail":
                self.truncate(database, what, number / 999)
            case "snapshot":
                self.snapshot(database, number, newest=flag)
            case "delete_snapshot":
                self.delete_snapshot(database, number)
            case "fork":
                self.fork(database, number)
            case "delete":
                self.delete(database, with_snapshots=flag)
            case "retention":
                self.set_retention(database, (None, 1, 2, 4)[number % 4], 1 + number % 3)
            case "read":
                self.check_newest(database)
                self.note("read")

    def create(self, engine: str) -> None:
        if len(self.databases) < DATABASES_MAX:
            self._create(engine)

    def append(self, database: DatabaseModel, count: int, size: int) -> None:
        payloads = [self.source.randbytes(size) for _ in range(count)]
        answer = self.world.request(
            "POST",
            f"{self.path(database.name)}/records",
            content=frame(payloads),
            headers={"Content-Type": RECORDS},
        )
        assert answer.status_code == 201, answer.text
        database.append(payloads, first_lsn=answer.json()["first_lsn"])
        self.note("append")

    def slow_log(self, database: DatabaseModel, rounds: int) -> None:
        """Small chunks next to each other."""
        for number in range(rounds):
            self.append(database, 1, 300 * (1 + number))
            self.checkpoint(database)

    def put_image(self, database: DatabaseModel, pages: int, *, resize: bool) -> None:
        if database.image is not None and not resize:
            pages = len(database.image) // PAGE
        image = sqlite_file(pages, self.source, database.image)
        answer = self.world.request("PUT", f"{self.path(database.name)}/image", content=image)
        assert answer.status_code == 200, answer.text
        assert answer.json()["lsn"] >= database.next_lsn
        database.image = image
        database.next_lsn = answer.json()["lsn"] + 1
        self.note("image")

    def checkpoint(self, database: DatabaseModel) -> None:
        self.sync_merges(database)
        answer = self.world.request(
            "POST", "/checkpoints", json={"tenant": self.tenant, "database": database.name}
        )
        job = self.world.job(answer)
        assert job["state"] == "completed", job
        if job["result"]["outcome"] == "published":
            database.publish(job["result"]["generation"])
        self.sync_merges(database)
        self.note("checkpoint")

    def truncate(self, database: DatabaseModel, direction: str, at: float) -> None:
        self.sync_merges(database)
        lsn = database.first_lsn + int(at * (database.next_lsn - database.first_lsn))
        end = database.next_lsn
        answer = self.world.request(
            "POST",
            "/truncations",
            json={
                "tenant": self.tenant,
                "database": database.name,
                "direction": direction,
                "lsn": lsn,
            },
        )
        if answer.status_code == 422:
            assert answer.json()["code"] == "lsn_out_of_range", answer.text
            return
        job = self.world.job(answer)
        if job["state"] == "failed":
            assert job["error"]["code"] == "snapshot_pinned", job
            assert database.snapshots or any(
                other is not database for other in self.databases.values()
            )
            return
        assert job["state"] == "completed", job
        result = job["result"]
        if result["outcome"] == "no_changes":
            return
        if direction == "head":
            spared = range(lsn, result["first_lsn"])  # a gap, if anything
            assert not any(each in spared for each in database.records)
            database.truncate(result["generation"], first_lsn=result["first_lsn"])
        else:
            database.truncate(result["generation"], tail=range(lsn, end))
        self.sync_merges(database)
        self.note(f"truncate {direction}")

    def snapshot(self, database: DatabaseModel, at: int, *, newest: bool) -> None:
        self.sync_merges(database)
        numbers = database.certain
        name = f"s{len(database.snapshots)}-{at}"
        body: dict[str, Any] = {"name": name}
        wanted = database.newest
        if numbers and not newest:
            wanted = body["generation"] = numbers[at % len(numbers)]
        answer = self.world.request("POST", f"{self.path(database.name)}/snapshots", json=body)
        if not numbers:
            assert (answer.status_code, answer.json()["code"]) == (409, "no_generation")
        elif name in database.snapshots:
            assert (answer.status_code, answer.json()["code"]) == (409, "snapshot_exists")
        else:
            assert answer.status_code == 201, answer.text
            assert answer.json()["generation"] == wanted
            database.snapshots[name] = wanted
            self.note("snapshot")

    def delete_snapshot(self, database: DatabaseModel, at: int) -> None:
        if not database.snapshots:
            return
        name = sorted(database.snapshots)[at % len(database.snapshots)]
        answer = self.world.request("DELETE", f"{self.path(database.name)}/snapshots/{name}")
        assert answer.status_code == 204, answer.text
        del database.snapshots[name]
        database.doubt()
        self.note("delete snapshot")

    def fork(self, database: DatabaseModel, at: int) -> None:
        if len(self.databases) >= DATABASES_MAX:
            return
        self.sync_merges(database)
        numbers = database.certain
        name = self._new_name()
        body: dict[str, Any] = {"database": name}
        if numbers:
            body["generation"] = numbers[at % len(numbers)]
        answer = self.world.request("POST", f"{self.path(database.name)}/forks", json=body)
        if not numbers:
            assert (answer.status_code, answer.json()["code"]) == (409, "no_generation")
            return
        assert answer.status_code == 201, answer.text
        told = answer.json()
        assert told["forked_from"]["generation"] == body["generation"]
        self.databases[name] = database.fork(
            name,
            body["generation"],
            next_lsn=told["next_lsn"],
            first_lsn=told["first_lsn"],
            own=told["generation"],
        )
        self.note("fork")

    def delete(self, database: DatabaseModel, *, with_snapshots: bool) -> None:
        query = "?snapshots=delete" if with_snapshots else ""
        answer = self.world.request("DELETE", self.path(database.name) + query)
        if database.snapshots and not with_snapshots:
            assert (answer.status_code, answer.json()["code"]) == (409, "snapshot_pinned")
            return
        assert self.world.request("GET", self.path(database.name)).status_code == 404
        job = self.world.job(answer)
        assert job["state"] == "completed", job
        del self.databases[database.name]
        self.note("delete")

    def set_retention(self, database: DatabaseModel, keep: int | None, minimum: int) -> None:
        rules = {"keep_generations": keep, "keep_seconds": None, "minimum_generations": minimum}
        answer = self.world.request("PATCH", self.path(database.name), json={"retention": rules})
        assert answer.status_code == 200, answer.text
        assert answer.json()["retention"] == rules
        database.retention = RetentionModel(
            keeps_all=False, keep_generations=keep, minimum_generations=minimum
        )
        database.doubt()
        self.note("retention")

    def crash(self) -> None:
        async def kill_and_start() -> None:
            await self.world.server.kill9()
            await self.world.server.start()

        self.world.run(kill_and_start())
        self.world.settle()
        self.note("crash")

    def collect(self) -> None:
        self._collect()
        self.check_history()
        self.check_store()
        self.note("collect")

    def _collect(self) -> None:
        self.world.settle()
        for database in self.databases.values():
            self.sync_merges(database)
        for _ in range(20):
            told = self.world.request("POST", "/admin/gc/run", json={}).json()
            assert told["failed_blobs"] == 0, told
            counts = ("expired_generations", "removed_rows", "doomed_blobs", "deleted_blobs")
            if not any(told[each] for each in counts) and not told["waiting_blobs"]:
                break
        else:
            raise AssertionError(f"collection does not come to an end: {told}")
        for database in self.databases.values():
            database.collect(self.generations_of(database))

    # --- what must hold

    def teardown(self) -> None:
        if not self.databases:
            return
        for database in self.databases.values():
            self.check_newest(database)
        self._collect()
        self.check_history()
        self.check_store()

    def check_newest(self, database: DatabaseModel) -> None:
        told = self.world.request("GET", self.path(database.name)).json()
        assert told["next_lsn"] >= database.next_lsn
        if database.engine == "libsql":
            answer = self.world.request("GET", f"{self.path(database.name)}/image")
            assert answer.content == (database.image or b"")
            return
        assert told["first_lsn"] == database.first_lsn
        found: dict[int, bytes] = {}
        lsn = told["first_lsn"]
        while lsn < told["next_lsn"]:
            answer = self.world.request(
                "GET", f"{self.path(database.name)}/records", params={"from_lsn": lsn}
            )
            assert answer.status_code == 200, answer.text
            if "Bop-First-Lsn" in answer.headers:
                first = int(answer.headers["Bop-First-Lsn"])
                found.update(enumerate(unframe(answer.content), start=first))
            assert int(answer.headers["Bop-Next-Lsn"]) > lsn
            lsn = int(answer.headers["Bop-Next-Lsn"])
        assert found == database.records

    def check_history(self) -> None:
        """Every retained generation reads back, and no other does."""
        for database in self.databases.values():
            assert self.generations_of(database) == set(database.generations)
            selectors = [
                ({"generation": number}, held) for number, held in database.generations.items()
            ]
            selectors += [
                ({"snapshot": name}, database.generations[number])
                for name, number in database.snapshots.items()
            ]
            for selector, held in selectors:
                if database.engine == "append_only":
                    found = self.scan_records(database, selector)
                    assert found == dict(held.records), (database.name, selector)
                else:
                    answer = self.world.request(
                        "GET", f"{self.path(database.name)}/image", params=selector
                    )
                    assert answer.content == held.image, (database.name, selector)
            if (
                database.newest > 1
                and 1 not in database.generations
                and database.engine == "libsql"
            ):
                answer = self.world.request(
                    "GET", f"{self.path(database.name)}/image", params={"generation": 1}
                )
                assert answer.status_code in {404, 410}, answer.text

    def scan_records(self, database: DatabaseModel, selector: dict[str, Any]) -> dict[int, bytes]:
        answer = self.world.request(
            "GET",
            "/cold-scan",
            params={"tenant": self.tenant, "database": database.name, **selector},
        )
        assert answer.status_code == 200, answer.text
        decoder = FrameDecoder()
        frames = decoder.feed(answer.content)
        decoder.finish()
        found: dict[int, bytes] = {}
        for each in frames:
            assert each.type is not FrameType.ERROR, each.problem()
            if each.type is FrameType.RECORDS:
                found.update(enumerate(unframe(bytes(each.payload)), start=each.first))
        return found

    def check_store(self) -> None:
        """Documents of the retained generations, the blobs that they name, and nothing else."""
        documents: set[str] = set()
        blobs: set[str] = set()
        remote = self.world.remote
        for database in self.databases.values():
            db_id = self.world.request("GET", self.path(database.name)).json()["db_id"]
            where = f"generations/{self.tenant}/{database.name}/{db_id}"
            for number in database.generations:
                key = f"{where}/{number:010d}.json.zst"
                documents.add(key)
                packed = (remote / key).read_bytes()
                document = msgspec.json.decode(zstandard.ZstdDecompressor().decompress(packed))
                for row in (*document["chunks"], *document["deltas"]):
                    blobs.add(row["blob"]["key"])
                    if base := row.get("base_key"):
                        blobs.add(base)
        assert files_below(remote / "generations" / self.tenant, remote) == documents
        assert files_below(remote / "checkpoints" / self.tenant, remote) == blobs
        snapshots = files_below(remote / "snapshots" / self.tenant, remote)
        assert len(snapshots) == sum(len(one.snapshots) for one in self.databases.values())


def files_below(folder: Path, root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def world(tmp_path: Path, fork_server: ForkServer) -> Iterator[World]:
    loop = asyncio.new_event_loop()
    server = ServerProcess(
        tmp_path / "data",
        launcher=fork_server,
        settings={
            "BOP_GC_GRACE_SECONDS": "0",
            "BOP_CHECKPOINT_INTERVAL_SECONDS": "0",
            "BOP_LOG_LEVEL": "warning",
        },
    )
    try:
        loop.run_until_complete(server.start())
        yield World(server, loop)
    finally:
        loop.run_until_complete(server.aclose())
        loop.close()
        print(server.log_tail())  # pytest shows it where the test failed


@pytest.mark.timeout(420)
def test_history_agrees_with_the_model(world: World):
    class Machine(HistoryMachine):
        pass

    Machine.world = world
    while sum(world.done.values()) < STEPS_MIN:  # examples are of different lengths
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                print_blob=True,
                phases=[Phase.generate],  # shrinking takes longer here than it helps
                suppress_health_check=list(HealthCheck),
            ),
        )
    print(dict(world.done))
    for each in ("merge", "fork", "truncate head", "truncate tail", "delete", "collect", "crash"):
        assert world.done[each], f"{each} never happened: {world.done}"
    assert world.run(world.server.terminate()) == 0
    assert world.run(fsck(Settings(data_dir=world.server.data_dir))).findings == ()
