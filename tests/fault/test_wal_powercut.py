"""Fault row 8 for the WAL, over its disk seam: the power fails between any two steps (I1, I13).

`test_powercut_wal.py` does the same to a whole process through its system calls; here every step
is cut, many ways each, and the protections are taken away one by one to see the check fail.
"""

import asyncio
import errno
import random
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from app.core.base.errors import DiskFull
from app.core.formats.damage import Damage
from app.core.stores.wal.disk import Buffer
from app.core.stores.wal.log import CatalogSegment, WalLog
from tests.fault.recording_disk import (
    Keep,
    Note,
    RecordingDisk,
    Step,
    after_cut,
    materialise,
)
from tests.unit.core.stores.wal.builders import (
    DB,
    Catalog,
    Place,
    append,
    append_together,
    read_all,
    request,
    settled,
)

CHUNK = 1500
KEYS = [(b"%d" % turn).ljust(16, b".") for turn in range(6)]
SEED = 20


@dataclass(frozen=True)
class Rows:
    rows: tuple[CatalogSegment, ...]


@dataclass(frozen=True)
class Acknowledged:
    records: Mapping[int, bytes]


@dataclass(frozen=True)
class NoRoom:
    answered: bool


@dataclass(frozen=True)
class Removed:
    last_lsn: int


class LyingDisk(RecordingDisk):
    """Says that it synced, and did not."""

    def __init__(self, lie: str) -> None:
        super().__init__()
        self.lie = lie
        self.full = False

    def write(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        count = super().write(fd, pieces, offset)
        if self.full:  # the worst of it: all of it went in before the error
            raise OSError(errno.ENOSPC, "No space left on device")
        return count

    def sync_data(self, fd: int) -> None:
        taken_back = type(self.steps[-1]).__name__ == "Truncate"
        if self.lie == "sync_data" or (self.lie == "sync_taken_back" and taken_back):
            return
        super().sync_data(fd)

    def sync_directory(self, path: Path) -> None:
        if self.lie == "sync_directory":
            return
        super().sync_directory(path)


@dataclass
class Recording:
    disk: LyingDisk
    root: Path
    written: dict[int, bytes] = field(default_factory=dict)
    requests: list[tuple[int, int]] = field(default_factory=list)


async def record(root: Path, lie: str) -> Recording:
    """Drafts, single appends, groups, spans, seals, removals, and groups that found no room."""
    disk = LyingDisk(lie)
    catalog = Catalog(on_commit=lambda catalog: disk.note(Rows(catalog.of())))
    place = Place(root=root / "wal", catalog=catalog, disk=disk)
    recording = Recording(disk, root)

    async def write(log: WalLog, *records: bytes, key: bytes | None = None) -> None:
        done = await append(log, *records, per_entry=1, key=key)
        added = dict(enumerate(records, done.first_lsn))
        recording.written.update(added)
        recording.requests.append((done.first_lsn, done.last_lsn))
        disk.note(Acknowledged(added))

    async def find_no_room(log: WalLog) -> None:
        await settled(log)
        disk.full = True
        disk.note(NoRoom(answered=False))
        failed = await append_together(log, request(b"never" * 9), request(b"never"))
        assert all(isinstance(one, DiskFull) for one in failed)
        disk.note(NoRoom(answered=True))
        disk.full = False

    async with place.log(chunk_bytes=CHUNK) as log:
        await write_draft(recording, log)
        for turn in range(6):
            await write(log, b"%d alone" % turn * 3)
            if turn % 2:
                await find_no_room(log)
            await asyncio.gather(
                *(write(log, b"%d.%d" % (turn, one) * 150) for one in range(4)),
                write(log, b"a" * 300, b"b" * 700, b"%d keyed" % turn, key=b"%d" % turn),
            )
            if turn % 2 == 0:
                await find_no_room(log)
            await write(log, b"%d after" % turn)
            if turn % 2:
                await log.seal()
                infos = log.sealed_segments()[:2]
                for info in infos:
                    catalog.checkpoint(info.segment_id)
                disk.note(Rows(catalog.of()))
                disk.note(Removed(infos[-1].last_lsn))
                await log.remove([info.segment_id for info in infos])
                if turn == 3:
                    await write_draft(recording, log)
        await write(log, b"x" * 1000, b"y" * 1000, b"z" * 1000)
        await settled(log)
    return recording


async def write_draft(recording: Recording, log: WalLog) -> None:
    records = [b"drafted %d " % one * 40 for one in range(12)]
    made = request(*records, per_entry=1)
    draft = await log.draft(made)
    assert draft is not None
    for count in range(len(records)):
        draft.write_blocking(count + 1)
        draft.sync_blocking()
    first_lsn = log.next_lsn
    added = dict(enumerate(records, first_lsn))
    recording.written.update(added)
    recording.requests.append((first_lsn, first_lsn + len(records) - 1))
    done = await log.append(made, draft=draft)
    assert done.first_lsn == first_lsn
    draft.close_blocking()
    recording.disk.note(Acknowledged(added))


async def violations(recording: Recording, scratch: Path) -> tuple[int, list[str]]:
    """Cuts before every step and at the end; how many states were looked at, and what is wrong."""
    chooser = random.Random(SEED)
    steps = recording.disk.steps
    found: list[str] = []
    states = 0
    for end in range(len(steps) + 1):
        for keep in ("synced", "all", "some", "some", "some"):
            states += 1
            problem = await look(recording, steps[:end], keep, chooser, scratch)
            if problem is not None:
                found.append(f"step {end} ({keep}): {problem}")
    return states, found


async def look(
    recording: Recording, steps: list[Step], keep: Keep, chooser: random.Random, scratch: Path
) -> str | None:
    build(recording, steps, keep, chooser, scratch)
    notes = [step.value for step in steps if isinstance(step, Note)]
    rows = next((note.rows for note in reversed(notes) if isinstance(note, Rows)), ())
    place = Place(
        root=scratch / "wal",
        catalog=Catalog(rows={DB: {row.segment_id: row for row in rows}}),
        threads=1,
    )
    async with place.log(chunk_bytes=CHUNK, has_lived=bool(rows)) as log:
        if log.health != "ok":
            return f"health is {log.health}"
        try:
            held, next_lsn = read_all(log), log.next_lsn
        except Damage as damage:
            return f"a sealed segment is damaged: {damage}"
        remembered = [log._keyed._remembered.get(key) for key in KEYS]
    if any(append is not None and append.last_lsn >= next_lsn for append in remembered):
        return "a key of an append that is not there"
    return judge(recording, notes, held, next_lsn)


def build(
    recording: Recording, steps: list[Step], keep: Keep, chooser: random.Random, scratch: Path
) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    materialise(after_cut(steps, keep, chooser), root=recording.root, at=scratch)


def judge(
    recording: Recording, notes: list[object], held: dict[int, bytes], next_lsn: int
) -> str | None:
    removed = max((note.last_lsn for note in notes if isinstance(note, Removed)), default=0)
    acknowledged: dict[int, bytes] = {}
    for note in notes:
        if isinstance(note, Acknowledged):
            acknowledged.update(note.records)
    lost = [lsn for lsn in acknowledged if lsn > removed and held.get(lsn) != acknowledged[lsn]]
    if lost:
        return f"acknowledged LSNs are lost: {lost}"
    refusals = [note.answered for note in notes if isinstance(note, NoRoom)]
    unknown = bool(refusals) and not refusals[-1]  # cut before it was refused
    for lsn, record in held.items():
        if recording.written.get(lsn) != record and not (unknown and record.startswith(b"never")):
            return "records out of nowhere"
    kept = [lsn for lsn in held if lsn > removed]
    if held and kept != list(range(removed + 1, next_lsn)):
        return "a hole"
    for first, last in recording.requests:
        present = sum(lsn in held for lsn in range(first, last + 1))
        if first > removed and present not in (0, last - first + 1):
            return f"part of a request: {first} to {last}"
    return None


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory, where there is one: only steps count here, not the real disk."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as directory:
        yield Path(directory)


async def test_a_power_cut_at_any_step_keeps_what_was_acknowledged(memory: Path) -> None:
    recording = await record(memory / "run", "nothing")
    states, found = await violations(recording, memory / "cut")
    assert found == []
    assert states > 1000


@pytest.mark.parametrize(
    ("lie", "harm"),
    [
        ("sync_data", "health is corrupt_wal"),
        ("sync_directory", "health is wal_lost"),
        ("sync_taken_back", "out of nowhere"),
    ],
)
async def test_a_missing_sync_is_seen(memory: Path, lie: str, harm: str) -> None:
    recording = await record(memory / "run", lie)
    _, found = await violations(recording, memory / "cut")
    assert any(harm in problem for problem in found), found[:5]
