"""Files without a row that go on where the log ends: of a crash, or newer than the manifest."""

import asyncio
import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.core.base.errors import CorruptWal, ManifestFull, NotReady
from app.core.formats.segment import EngineCode
from app.core.stores.wal.log import WalLog
from tests.unit.core.stores.wal.builders import (
    DB,
    Catalog,
    Hold,
    Place,
    append,
    append_together,
    config,
    read_all,
    request,
    settled,
)
from tests.unit.core.stores.wal.disks import FaultyDisk


def contents(place: Place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.files()}


async def backed_up(place: Place, log: WalLog) -> Catalog:
    """The manifest as it was when "one" was all that was there."""
    await append(log, b"one")
    return place.catalog.copy()


async def check_goes_on(place: Place, *records: bytes) -> None:
    """What is there is these, and stays, and more is appended behind them."""
    for turn in range(2):
        async with place.log(has_lived=True) as log:
            assert (log.health, list(read_all(log).values())) == ("ok", [*records])
            assert log.next_lsn == len(records) + 1
            if turn:
                assert (await append(log, b"more")).first_lsn == len(records) + 1
                await log.seal()
    async with place.log(has_lived=True) as log:
        assert list(read_all(log).values()) == [*records, b"more"]
    assert {row.segment_id for row in place.catalog.of()} == {
        int(path.stem) for path in place.files()
    }


@pytest.mark.parametrize("sealed", [False, True])
async def test_a_single_append_after_the_manifest_was_copied_is_kept(
    place: Place, sealed: bool
) -> None:
    """No entry says that it was acknowledged: it might be a crash's, which may be kept as well."""
    async with place.log() as log:
        backup = await backed_up(place, log)
        await log.seal()
        await append(log, b"two", key=b"key")
        if sealed:
            await log.seal()
    place.catalog = backup
    async with place.log(has_lived=True) as log:
        again = await append(log, b"two", key=b"key")
        assert (again.first_lsn, again.replayed) == (2, True)
    assert place.log_of_events.fields("wal.adopted") == [
        {"db_id": DB, "segment_id": 2, "first_lsn": 2}
    ]
    await check_goes_on(place, b"one", b"two")


async def test_a_request_that_goes_on_in_files_without_rows_is_kept_or_cut_whole(
    place: Place, tmp_path: Path, hold_at: Callable[[str], Hold]
) -> None:
    """It begins in a segment that has a row."""
    parts = [b"a" * 2000, b"b" * 3000, b"c" * 3000, b"d" * 10]
    crashed = tmp_path / "crashed"
    async with place.log() as log:
        backup = await backed_up(place, log)
        hold = hold_at("wal.before_register")
        appending = asyncio.ensure_future(append(log, *parts, per_entry=1))
        await hold.reached()
        shutil.copytree(place.root, crashed)
        hold.release()
        await appending
        await settled(log)
    for missing in (None, 1, 2):
        place.root, place.catalog = tmp_path / f"without{missing}", backup.copy()
        shutil.copytree(crashed, place.root)
        assert len(place.files()) == 3
        if missing is not None:
            place.files()[missing].unlink()
        await check_goes_on(place, *([b"one", *parts] if missing is None else [b"one"]))


async def test_a_sealed_file_without_the_rest_of_its_request_is_damage(place: Place) -> None:
    """Sealed: it was acknowledged."""
    async with place.log() as log:
        backup = await backed_up(place, log)
        await append(log, b"a" * 2000, b"b" * 3000, per_entry=1)
        await settled(log)
    place.files()[1].unlink()
    before = contents(place)
    place.catalog = backup
    async with place.log(has_lived=True) as log:
        assert log.health == "corrupt_wal"
    assert contents(place) == before


async def test_a_published_segment_may_outlive_the_one_that_its_last_request_ends_in(
    place: Place,
) -> None:
    """A reader had it pinned when both were to be removed."""
    async with place.log() as log:
        await append(log, b"a" * 2000, b"b" * 3000, per_entry=1)
        await log.seal()
        for info in log.sealed_segments():
            place.catalog.checkpoint(info.segment_id)
        with log.pin(1, 1):
            assert await log.remove([1, 2]) == (2,)
    async with place.log(floor_lsn=3, has_lived=True) as log:
        assert (log.health, log.next_lsn) == ("ok", 3)


async def test_a_file_torn_anywhere_is_kept_up_to_its_last_whole_request(
    place: Place, tmp_path: Path
) -> None:
    async with place.log() as log:
        backup = await backed_up(place, log)
        await log.seal()
        await append_together(log, request(b"two"), request(b"three", b"four", per_entry=1))
    origin, name = place.root, place.files()[1].name
    data = (origin / str(DB) / name).read_bytes()
    ends = [64 + 87, len(data)]
    for size in [*range(0, len(data), 7), *ends, *(end - 1 for end in ends)]:
        place.root, place.catalog = tmp_path / f"cut{size}", backup.copy()
        shutil.copytree(origin, place.root)
        (place.root / str(DB) / name).write_bytes(data[:size])
        kept = [b"two", b"three", b"four"][: 0 if size < ends[0] else 1 if size < ends[1] else 3]
        async with place.log(has_lived=True) as log:
            assert (log.health, list(read_all(log).values())) == ("ok", [b"one", *kept])
            assert log.next_lsn == 2 + len(kept)
            assert len(place.files()) == 1 + bool(kept)
            assert (await append(log, b"more")).first_lsn == 2 + len(kept)
        shutil.rmtree(place.root)


async def test_what_does_not_go_on_with_the_log_goes(place: Place) -> None:
    """Behind a gap, of another database, or of another engine."""
    async with place.log() as log:
        backup = await backed_up(place, log)
        await log.seal()
        await append(log, b"two")
    stray = place.files()[1]
    data = stray.read_bytes()
    stray.rename(stray.with_name(f"{3:016d}.wal"))
    place.catalog = backup
    async with place.log(has_lived=True) as log:
        assert (log.health, read_all(log)) == ("ok", {1: b"one"})
        assert len(place.files()) == 1
    place.root.joinpath("8").mkdir()
    lived = config(has_lived=True)
    for strange in (replace(lived, db_id=8), replace(lived, engine=EngineCode.LIBSQL)):
        path = place.root / str(strange.db_id) / stray.name
        path.write_bytes(data)
        async with place.store() as store:
            log = await store.open_log(replace(strange, floor_lsn=2), ())
            assert (log.health, log.next_lsn, read_all_or_none(log)) == ("ok", 2, {})
        assert not path.exists()


def read_all_or_none(log: WalLog) -> dict[int, bytes]:
    return read_all(log) if log.first_lsn is not None else {}


async def test_a_database_that_never_lived_takes_nothing_over(place: Place) -> None:
    """The files may be another's, which had the id in a life that the manifest does not know."""
    async with place.log() as log:
        await append(log, b"another's")
    place.catalog = Catalog()
    async with place.log() as log:
        assert (log.next_lsn, log.first_lsn) == (1, None)
    assert place.files() == []


async def test_rows_that_the_manifest_refuses_stop_the_log_until_the_next_start(
    place: Place,
) -> None:
    async with place.log() as log:
        backup = await backed_up(place, log)
        await log.seal()
        await append(log, b"two")
    before = contents(place)
    place.catalog = backup
    backup.refusals.append(ManifestFull())
    async with place.log(has_lived=True) as log:
        assert log.health == "corrupt_wal"
        with pytest.raises(CorruptWal):
            await append(log, b"other")
    assert contents(place) == before
    await check_goes_on(place, b"one", b"two")


async def test_what_was_refused_does_not_come_back_with_its_files_name(
    place: Place, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may bring the name back: it was not synced that it went."""
    async with place.log() as log:
        await append(log, b"one")
        await log.seal()
        monkeypatch.setattr(disk, "unlink", lambda _: None)
        disk.fail("sync_directory", errno.EMFILE)
        with pytest.raises(NotReady):
            await append(log, b"two")
        assert len(place.files()) == 2
        monkeypatch.undo()
    async with place.log(has_lived=True) as log:
        assert read_all(log) == {1: b"one"}
        assert len(place.files()) == 1
