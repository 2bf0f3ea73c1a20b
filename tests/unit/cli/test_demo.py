import asyncio
import json
import signal

import pytest

from app.cli import demo
from app.cli.demo import Report, Stage, checkpointed, lose_disk
from app.cli.demo_records import DATABASE, RecordLog
from app.cli.failures import Failure
from app.cli.screen import Screen
from app.client import BopClient
from app.core.base.clock import SystemClock
from tests.helpers.fake_api import FakeApi


@pytest.fixture
def stage() -> Stage:
    return Stage(Screen("json"), SystemClock())


@pytest.fixture
async def filled(api: FakeApi, stage: Stage):
    """A client, and the record log that it has filled."""
    async with BopClient("http://bop.test", transport=api.transport()) as client:
        part = RecordLog(200_000)
        await part.fill(client, stage)
        yield client, part


async def test_the_record_log_is_verified_byte_for_byte(api, stage, filled):
    client, part = filled
    await part.verify(client, stage)
    assert stage.report.verified
    steps = {step.name: step for step in stage.report.steps}
    assert steps["Read everything back"].bytes >= 200_000
    assert steps["Checkpoint only what changed"].bytes == 2048
    assert len(steps) == 5


@pytest.mark.parametrize("damage", ["a byte", "a record", "an order"])
async def test_damage_is_seen(api, stage, filled, damage):
    client, part = filled
    records = api.databases["demo", DATABASE].records
    match damage:
        case "a byte":
            records[7] = records[7][:-1] + b"!"
        case "a record":
            del records[7]
        case "an order":
            records[7], records[8] = records[8], records[7]
    await part.verify(client, stage)
    assert not stage.report.verified


async def test_a_checkpoint_that_fails_ends_the_demo(api, stage):
    api.add_database("demo", "x")
    api.add_job("pending", "failed")
    async with BopClient("http://bop.test", transport=api.transport()) as client:
        with pytest.raises(Failure, match="lease_timeout"):
            await checkpointed(client, stage, "Checkpoint it", "x")


def test_the_lost_disk_keeps_the_remote_store_only(tmp_path, stage):
    for name in ("manifest/data.mdb", "wal/1/1.wal", "hot_cache/x", "remote/blobs/y", "lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    with (tmp_path / "manifest/data.mdb").open("ab") as sparse:
        sparse.truncate(1 << 30)
    (tmp_path / "hot_cache/link").hardlink_to(tmp_path / "wal/1/1.wal")
    lose_disk(tmp_path, stage)
    assert [path.name for path in tmp_path.iterdir()] == ["remote"]
    assert (tmp_path / "remote/blobs/y").read_bytes() == b"12345"
    one_file = (tmp_path / "remote/blobs/y").stat().st_blocks * 512
    assert stage.report.steps[0].bytes == 4 * one_file


@pytest.mark.parametrize(("holds", "exit_code"), [(True, 0), (False, 1)])
def test_the_exit_code_is_the_verification(cli, monkeypatch, holds, exit_code):
    async def played(screen, clock, log_bytes) -> Report:
        assert log_bytes == 3 * 1024 * 1024
        return Report(checks={"SHA-256 is the same": holds})

    monkeypatch.setattr(demo, "until_signalled", played)
    ran = cli.json("demo", "--size-mib", "3")
    assert ran.exit_code == exit_code
    assert json.loads(ran.stdout)["verified"] is holds
    assert ("✓" if holds else "✗") in cli("demo", "--size-mib", "3").stdout


def test_nothing_checked_is_not_verified():
    assert not Report().verified


def test_a_signal_ends_the_demo_in_order(cli, monkeypatch):
    ended = []

    async def play(screen, clock, log_bytes):
        try:
            signal.raise_signal(signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    monkeypatch.setattr(demo, "run_demo", play)
    assert cli("demo").exit_code == 128 + signal.SIGTERM
    assert ended == [True]
