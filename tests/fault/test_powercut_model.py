"""The power-cut recorder itself: what it holds to be durable, lost, or torn."""

import os
import sys
from pathlib import Path

import pytest

from tests.fault.conftest import requires_strace
from tests.helpers.disk_replay import RecordingIncomplete
from tests.helpers.powercut import (
    SECTOR_BYTES,
    Cut,
    Mode,
    Recording,
    Tree,
    record,
)

pytestmark = requires_strace

PRELUDE = """
import json, mmap, os, threading
os.chdir(os.environ["POWERCUT_ROOT"])
notes = os.open(os.environ["POWERCUT_NOTES"], os.O_WRONLY | os.O_APPEND)
def note(at): os.write(notes, json.dumps({"at": at}).encode() + b"\\n")
def made(name, flags=0): return os.open(name, os.O_RDWR | os.O_CREAT | flags, 0o600)
def sync_directory(name="."):
    fd = os.open(name, os.O_RDONLY); os.fsync(fd); os.close(fd)
"""


def recorded(tmp_path: Path, script: str) -> Recording:
    return record(
        [sys.executable, "-c", PRELUDE + script],
        environment={"PATH": os.environ["PATH"]},
        cwd=tmp_path,
        work=tmp_path / "recording",
    )


def cut_at(recording: Recording, at: str, mode: Mode, seed: int = 0) -> Cut:
    lines = [line for line in recording.lines if {"at": at} in recording.cut(line, "kept").notes]
    return recording.cut(lines[0], mode, seed)


def left(recording: Recording, at: str, mode: Mode, seed: int = 0) -> Tree:
    return cut_at(recording, at, mode, seed).tree


def test_a_file_needs_its_own_sync_and_its_directorys(tmp_path: Path) -> None:
    recording = recorded(
        tmp_path,
        """
fd = made("a"); os.write(fd, b"one"); note("written")
os.fdatasync(fd); note("file synced")
sync_directory(); note("directory synced")
os.write(fd, b"two"); note("more")
os.rename("a", "b"); note("renamed")
sync_directory(); note("rename synced")
os.unlink("b"); note("unlinked")
sync_directory(); note("unlink synced")
""",
    )
    assert left(recording, "written", "kept") == {"a": b"one"}
    assert left(recording, "written", "dropped") == {}
    assert left(recording, "file synced", "dropped") == {}
    assert left(recording, "directory synced", "dropped") == {"a": b"one"}
    assert left(recording, "more", "dropped") == {"a": b"one"}
    assert left(recording, "renamed", "dropped") == {"a": b"one"}
    assert left(recording, "renamed", "kept") == {"b": b"onetwo"}
    assert left(recording, "rename synced", "dropped") == {"b": b"one"}
    assert left(recording, "unlinked", "dropped") == {"b": b"one"}
    assert left(recording, "unlink synced", "dropped") == {}


def test_a_directory_synced_before_its_file_shows_an_empty_file(tmp_path: Path) -> None:
    recording = recorded(
        tmp_path, 'fd = made("a"); os.write(fd, b"one"); sync_directory(); note("named")'
    )
    assert left(recording, "named", "dropped") == {"a": b""}


def test_synchronous_writes_are_durable_at_their_return(tmp_path: Path) -> None:
    recording = recorded(
        tmp_path,
        """
lazy, eager = made("a"), made("a", os.O_DSYNC); sync_directory()
os.pwrite(lazy, b"lazy", 0); os.pwritev(eager, [b"ea", b"ger"], 10); note("written")
""",
    )
    assert left(recording, "written", "dropped") == {"a": bytes(10) + b"eager"}
    assert left(recording, "written", "kept") == {"a": b"lazy" + bytes(6) + b"eager"}


def test_torn_writes_mix_whole_sectors(tmp_path: Path) -> None:
    recording = recorded(
        tmp_path,
        """
fd = made("a"); os.pwrite(fd, b"o" * 2048, 0); os.fsync(fd); sync_directory()
os.pwrite(fd, b"n" * 2048, 0); note("overwritten")
""",
    )
    states = {left(recording, "overwritten", "torn", seed)["a"] for seed in range(200)}
    for state in states:
        assert state is not None
        sectors = {state[at : at + SECTOR_BYTES] for at in range(0, 2048, SECTOR_BYTES)}
        assert sectors <= {b"o" * SECTOR_BYTES, b"n" * SECTOR_BYTES}
    assert len(states) == 16


def test_a_torn_append_may_leave_its_length_alone(tmp_path: Path) -> None:
    recording = recorded(
        tmp_path, 'fd = made("a"); sync_directory(); os.write(fd, b"n" * 700); note("appended")'
    )
    states = {left(recording, "appended", "torn", seed)["a"] for seed in range(200)}
    assert states == {
        b"",
        bytes(700),
        b"n" * 512,
        bytes(512) + b"n" * 188,
        b"n" * 700,
    }


def test_a_sync_covers_only_what_ended_before_it_began(tmp_path: Path) -> None:
    """The sync is given a write that it raced with only if that had returned before."""
    recording = recorded(
        tmp_path,
        """
fd = made("a"); sync_directory()
def write(at):
    for _ in range(20): os.pwrite(fd, b"x" * 512, at * 512); os.fdatasync(fd)
threads = [threading.Thread(target=write, args=(at,)) for at in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
note("joined")
""",
    )
    assert left(recording, "joined", "dropped") == {"a": b"x" * 2048}


def test_links_moves_and_trees_are_followed(tmp_path: Path) -> None:
    recording = recorded(
        tmp_path,
        """
os.makedirs("d/e"); fd = made("d/a"); os.writev(fd, [b"12", b"34"]); os.link("d/a", "d/e/b")
os.ftruncate(fd, 3); os.lseek(fd, 1, 0); os.write(fd, b"X"); os.close(fd)
top = os.open("d", os.O_RDONLY); os.rename("a", "e/c", src_dir_fd=top, dst_dir_fd=top)
os.fsync(top); note("parent synced")
os.rename("d/e/c", "d/e/b"); os.unlink("d/e/c"); sync_directory("d/e")
sync_directory(); note("all synced")
""",
    )
    assert left(recording, "parent synced", "kept") == {
        "d": None, "d/e": None, "d/e/b": b"1X3", "d/e/c": b"1X3",
    }  # fmt: skip
    assert left(recording, "parent synced", "dropped") == {}
    assert left(recording, "all synced", "dropped")["d/e/b"] == b""


@pytest.mark.parametrize(
    "script",
    [
        'fd = made("a"); os.ftruncate(fd, 9); mmap.mmap(fd, 9)[0:1] = b"x"',
        'os.symlink("a", "b")',
        'fd = made("a"); os.fsync(fd); os.sync()',
    ],
    ids=["mapping", "symlink", "sync"],
)
def test_what_is_not_modelled_fails_the_recording(tmp_path: Path, script: str) -> None:
    with pytest.raises(RecordingIncomplete):
        recorded(tmp_path, script)
