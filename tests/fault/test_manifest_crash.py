"""Kills, power cuts and failing disks under the manifest (proving rows 6, 9, 12, 13, 17, 18)."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core.base.errors import DiskFull, StartRefused
from app.core.stores.manifest import ops
from app.core.stores.manifest.replay import replay
from tests.unit.core.stores.manifest.builders import batch, create_database, open_store

ROOT = Path(__file__).parents[2]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def start(path: Path, count: int, *place: str, through: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*through, sys.executable, "-m", "tests.fault.manifest_child", str(path), str(count)]
    return subprocess.Popen([*command, *place], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def finish(child: subprocess.Popen) -> list[str]:
    said, _ = child.communicate(timeout=60)
    return said.splitlines()


def acked(said: list[str]) -> int:
    return max((int(line.split()[1]) for line in said if line.startswith("acked")), default=0)


async def generations_of_sound_manifest(path: Path) -> int:
    """The number of published generations, all of whose parts are there and in the log."""
    store = await open_store(path)
    try:
        with store.read() as view:
            changes = view.change_log(limit=100_000)
            assert [change.sequence for change in changes] == list(
                range(1, view.last_sequence() + 1)
            )
            assert replay(changes) == view.catalogue()
            db_id = view.database_id("acme", "db")
            if db_id is None:
                assert changes == []
                return 0
            count = view.database(db_id).generation
            assert int(view.meta("marker") or 0) == count
            assert [row.chunk_id for row in view.chunk_rows(db_id)] == list(range(1, count + 1))
            assert [row.generation for row in view.generations(db_id)] == list(range(1, count + 1))
            return count
    finally:
        await store.aclose()


@pytest.mark.parametrize(
    ("place", "kept"),
    [("before_apply", 0), ("mid_apply", 0), ("before_commit", 0), ("after_commit", 1)],
)
async def test_kill_inside_lmdb_transaction(tmp_path: Path, place: str, kept: int) -> None:
    child = start(tmp_path / "manifest", 10, f"manifest.{place}", "5")
    said = finish(child)
    assert child.returncode == -signal.SIGKILL
    assert acked(said) == 3
    assert await generations_of_sound_manifest(tmp_path / "manifest") == 3 + kept


async def test_kill_at_any_moment_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    for round_number, wanted in enumerate((1, 7, 40)):
        path = tmp_path / str(round_number)
        child = start(path, 100_000)
        said = []
        for line in child.stdout:
            said.append(line)
            if line == f"acked {wanted}\n":
                break
        child.kill()
        said += finish(child)
        count = await generations_of_sound_manifest(path)
        assert acked(said) <= count <= acked(said) + 1


@pytest.mark.parametrize(
    "place", ["before_create_rename", "after_create_rename", "before_migration_commit"]
)
async def test_kill_while_the_environment_is_created(tmp_path: Path, place: str) -> None:
    path = tmp_path / "manifest"
    child = start(path, 1, f"manifest.{place}", "1")
    assert finish(child) == []
    assert child.returncode == -signal.SIGKILL
    assert path.exists() == (place != "before_create_rename")
    assert await generations_of_sound_manifest(path) == 0
    assert finish(start(path, 2))[-2:] == ["acked 2", "fatal 0"]


@needs_strace
def test_power_cut_order_of_the_creation(tmp_path: Path) -> None:
    """Contents and directory are durable before the rename, the rename before anything else."""
    trace = tmp_path / "trace"
    calls = "trace=fsync,rename,renameat,renameat2"
    finish(
        start(
            tmp_path / "data" / "manifest",
            0,
            through=("strace", "-f", "-y", "-o", str(trace), "-e", calls),
        )
    )
    where = re.escape(str(tmp_path / "data"))
    steps = [
        rf"fsync\(\d+<{where}/\.manifest\.new/data\.mdb>\) *= 0",
        rf"fsync\(\d+<{where}/\.manifest\.new>\) *= 0",
        rf'rename\("{where}/\.manifest\.new", "{where}/manifest"\) *= 0',
        rf"fsync\(\d+<{where}>\) *= 0",
    ]
    assert re.search(".*".join(steps), trace.read_text(), re.DOTALL)


@needs_strace
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64"])
async def test_lmdb_eio_ends_acknowledgements_at_once(tmp_path: Path, call: str) -> None:
    path = tmp_path / "manifest"
    assert finish(start(path, 0)) == ["open", "fatal 0"]
    inject = ("strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:error=EIO:when=3")
    said = finish(start(path, 6, through=inject))
    good = acked(said)
    assert 0 < good < 6
    assert said == [
        "open",
        *(f"acked {number}" for number in range(1, good + 1)),
        *(f"failed {number}" for number in range(good + 1, 7)),
        "fatal 1",
    ]
    # The outcome of the failed one is unknown; nothing after it was let in.
    assert good <= await generations_of_sound_manifest(path) <= good + 1


@needs_strace
async def test_no_room_for_the_meta_page_is_not_passed_off_as_a_clean_refusal(
    tmp_path: Path,
) -> None:
    """LMDB has panicked then: 507 would promise that things go on."""
    ends = []
    for nth in range(1, 5):
        path = tmp_path / str(nth)
        assert finish(start(path, 0)) == ["open", "fatal 0"]
        inject = (
            "strace",
            "-f",
            "-o",
            "/dev/null",
            "-e",
            f"inject=pwrite64:error=ENOSPC:when={nth}",
        )
        said = finish(start(path, 3, through=inject))
        count = await generations_of_sound_manifest(path)
        if any(line.startswith("full") for line in said):
            ends.append("full")
            assert (said[-1], count) == ("fatal 0", acked(said))
        else:
            ends.append("failed")
            assert said[-2:] == ["failed 3", "fatal 1"]
            assert acked(said) <= count <= acked(said) + 1
    assert set(ends) == {"full", "failed"}
    assert ends.count("failed") >= 2


def _ran(*command: str) -> bool:
    return (
        shutil.which(command[0]) is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system of its own, where one may be mounted."""
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(24 * 1024 * 1024)
    on_ext4 = _ran("mkfs.ext4", "-q", "-m", "0", str(image)) and _ran(
        "mount", "-o", "loop", str(image), str(place)
    )
    if not on_ext4 and not _ran("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)):
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_disk_full_under_the_manifest_then_room_again(small_disk: Path) -> None:
    fatal: list[BaseException] = []
    store = await open_store(small_disk / "manifest", on_fatal=fatal.append)
    db_id = await create_database(store)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 65_536):
                pass
        except OSError:
            pass
    big = ops.PutMeta(name="big", value=b"x" * 2_000_000)
    for _ in range(2):
        with pytest.raises(DiskFull):
            await store.commit(batch(ops.SetHealth(db_id=db_id, health="wal_lost"), big))
    with store.read() as view:
        assert view.database(db_id).health == "ok"
        assert view.meta("big") is None
    filler.unlink()
    await store.commit(batch(ops.SetHealth(db_id=db_id, health="wal_lost"), big))
    await store.aclose()
    assert fatal == []
    store = await open_store(small_disk / "manifest")
    with store.read() as view:
        assert view.database(db_id).health == "wal_lost"
        assert view.last_sequence() == 2
        assert replay(view.change_log()) == view.catalogue()
    await store.aclose()


PARKED_READERS = """
import lmdb, sys
environment = lmdb.open(sys.argv[1], max_dbs=64, create=False)
held = []
try:
    while True:
        held.append(environment.begin())
except lmdb.ReadersFullError:
    print("held", flush=True)
sys.stdin.read()
"""


async def test_killed_reader_gives_its_slots_back(tmp_path: Path) -> None:
    store = await open_store(tmp_path / "manifest", max_readers=4)
    child = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs on this loop
        [sys.executable, "-c", PARKED_READERS, str(tmp_path / "manifest")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "held\n"
    child.kill()
    child.communicate(timeout=60)
    with store.read() as view:
        assert view.meta("node_id")
    await store.aclose()


async def test_second_process_on_the_same_manifest_refuses_to_start(tmp_path: Path) -> None:
    child = start(tmp_path / "manifest", 1_000_000)
    for line in child.stdout:
        if line == "acked 1\n":
            break
    with pytest.raises(StartRefused, match="Another process"):
        await open_store(tmp_path / "manifest")
    child.kill()
    finish(child)
    assert await generations_of_sound_manifest(tmp_path / "manifest") >= 1
