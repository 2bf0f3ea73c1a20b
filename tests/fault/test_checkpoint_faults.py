"""A whole checkpoint against an S3 that fails in its middle, and on disks that fill up.

Fault rows 1, 3, 24-27 and 34 at the height of the service: the checkpoint completes in the end
with nothing doubled, or ends with a clear code; appends go on meanwhile; nothing is left behind.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeServer
from tests.helpers.fault_proxy import (
    Answer,
    Blackhole,
    FaultProxy,
    FlipBit,
    LoseAnswer,
    ResetRequest,
    Rule,
    Stall,
    Throttle,
)
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS, frame, scratch_left, unframe

LOG = "/tenants/acme/databases/log"
CHUNKS = r"/chunk-"
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    with SeaweedS3.running(tmp_path_factory.mktemp("seaweed") / "server") as server:
        yield server


@pytest.fixture
async def proxy(seaweed: SeaweedS3) -> AsyncIterator[FaultProxy]:
    async with FaultProxy.running("127.0.0.1", seaweed.port) as proxy:
        yield proxy


@pytest.fixture
async def server(make_server: MakeServer, seaweed: SeaweedS3, proxy: FaultProxy) -> ServerProcess:
    """A service behind the proxy, with four segments of records waiting to be checkpointed."""
    server = make_server(
        settings={
            "BOP_REMOTE_URL": f"s3://{seaweed.bucket()}/faults",
            "BOP_S3_ENDPOINT_URL": proxy.endpoint,
            "BOP_S3_REGION": seaweed.region,
            "BOP_REMOTE_ATTEMPTS": "2",
            "BOP_REMOTE_IDLE_TIMEOUT_SECONDS": "2",
            "BOP_REMOTE_RETRY_BASE_SECONDS": "0.01",
            **seaweed.environment(),
        }
    )
    await server.start()
    await server.client.put(LOG, json={"engine": "append_only", "chunk_bytes": 65536})
    for number in range(4):
        await append(server, [bytes([number]) * 60_000])
    return server


async def append(server: ServerProcess, records: list[bytes]) -> None:
    answer = await server.client.post(
        f"{LOG}/records", content=frame(records), headers={"Content-Type": RECORDS}
    )
    assert answer.status_code == 201, answer.text


async def trigger(server: ServerProcess) -> str:
    answer = await server.client.post("/checkpoints", json={"tenant": "acme", "database": "log"})
    return answer.json()["id"]


async def ended(server: ServerProcess, job_id: str) -> dict:
    job: dict = {"state": ""}
    while job["state"] not in {"completed", "failed", "cancelled"}:
        job = (await server.client.get(f"/checkpoints/{job_id}?wait=20")).json()
    return job


async def assert_nothing_left(server: ServerProcess) -> None:
    assert scratch_left(server.data_dir) == []
    assert (await server.client.get("/debug/checkpoint/leases")).json()["items"] == []
    assert (await server.client.get("/debug/storage/quota")).json()["jobs"] == []
    report = (await server.client.get("/debug/manifest/fsck")).json()
    assert report["findings"] == []


@pytest.mark.parametrize(
    "action",
    [
        Answer.slow_down(),
        Answer.too_many_requests(),
        Answer.internal_error(),
        ResetRequest(after_bytes=10_000),
        LoseAnswer(),
        Stall(after_bytes=0),
        Answer(status=400, code="BadDigest"),
    ],
    ids=["503", "429", "500", "reset", "lost-answer", "stall", "wrong-checksum"],
)
async def test_a_checkpoint_outlives_an_s3_that_fails_in_mid_upload(server, proxy, action):
    damaged = isinstance(action, Answer) and action.code == "BadDigest"
    times = 1 if damaged else 3  # one chunk that arrives damaged twice is no longer the network's
    proxy.add(Rule(method="PUT", path=CHUNKS, action=action, skip=1, times=times))
    job_id = await trigger(server)
    await append(server, [b"appends go on"])
    job = await ended(server, job_id)
    assert job["state"] == "completed", job
    generations = (await server.client.get(f"{LOG}/generations")).json()["items"]
    assert [one["generation"] for one in generations] == [1]
    content = (await server.client.get(f"{LOG}/records?from_lsn=1&to_lsn=4")).content
    assert unframe(content) == [bytes([number]) * 60_000 for number in range(4)]
    await assert_nothing_left(server)


async def test_a_lasting_outage_degrades_and_is_outlived(server, proxy):
    outage = Answer(status=503, code="ServiceUnavailable")
    proxy.add(Rule(method="PUT", path="/", action=outage, times=None))
    job_id = await trigger(server)

    async def degraded() -> bool:
        ready = await server.client.get("/readyz")
        assert ready.status_code == 200
        return ready.json()["degraded"] == ["remote"]

    await wait_until(degraded, timeout=20)
    waiting = (await server.client.get(f"/checkpoints/{job_id}")).json()
    assert waiting["state"] in {"pending", "in_flight"}
    await append(server, [b"taken all the same"])
    proxy.clear()
    assert (await ended(server, job_id))["state"] == "completed"
    assert (await server.client.get("/readyz")).json()["degraded"] == []
    await assert_nothing_left(server)


async def test_a_cancelled_checkpoint_leaves_nothing_and_the_next_covers_all(server, proxy):
    proxy.add(Rule(method="PUT", path=CHUNKS, action=Stall(after_bytes=0), times=1))
    job_id = await trigger(server)
    await proxy.seen(1, "PUT", CHUNKS)
    told = await server.client.post(f"/checkpoints/{job_id}/cancel")
    assert told.status_code == 202
    assert (await ended(server, job_id))["state"] == "cancelled"
    again = await server.client.post(f"/checkpoints/{job_id}/cancel")
    assert again.json()["code"] == "job_already_ended"
    assert (await server.client.get(LOG)).json()["generation"] == 0
    await assert_nothing_left(server)
    job = await ended(server, await trigger(server))
    assert (job["state"], job["result"]["last_lsn"]) == ("completed", 4)
    await assert_nothing_left(server)


async def test_an_upload_that_moves_is_no_stall_and_one_that_hangs_is(server, proxy, seaweed):
    """A stall of 4 s, an upload of 8. Its last MiB or two leave unseen, out of the kernel."""
    await server.terminate()
    server.settings |= {
        "BOP_JOB_STALL_SECONDS": "4",
        "BOP_REMOTE_IDLE_TIMEOUT_SECONDS": "60",
        "BOP_CHECKPOINT_INTERVAL_SECONDS": "0",
    }
    await server.start()
    await server.client.put(LOG + "2", json={"engine": "append_only", "chunk_bytes": 32 * MIB})

    async def checkpointed() -> dict:
        record = frame([os.urandom(16 * MIB)])
        answer = await server.client.post(
            f"{LOG}2/records", content=record, headers={"Content-Type": RECORDS}
        )
        assert answer.status_code == 201, answer.text
        told = await server.client.post("/checkpoints", json={"tenant": "acme", "database": "log2"})
        return await ended(server, told.json()["id"])

    proxy.add(Rule(method="PUT", path=CHUNKS, action=Throttle(bytes_per_second=2 * MIB), times=1))
    begun = time.monotonic()
    job = await checkpointed()
    assert time.monotonic() - begun > 6
    assert (job["state"], job["attempts"]) == ("completed", 1)

    proxy.add(Rule(method="PUT", path=CHUNKS, action=Blackhole(read=False), times=1))
    job = await checkpointed()
    assert (job["state"], job["attempts"]) == ("completed", 2)
    retried = [
        line
        for line in map(json.loads, server.log_path.read_text().splitlines())
        if line["event"] == "job.retrying"
    ]
    assert [line["code"] for line in retried] == ["deadline_exceeded"]


async def test_while_the_store_is_silent_a_checkpoint_and_one_behind_it_are_cancelled_at_once(
    server, proxy
):
    proxy.add(Rule(method="PUT", path=CHUNKS, action=Stall(after_bytes=0), times=None))
    job_id = await trigger(server)
    await proxy.seen(1, "PUT", CHUNKS)
    behind_id = await trigger(server)
    assert behind_id != job_id
    told = await server.client.post(f"/checkpoints/{behind_id}/cancel")
    assert (told.status_code, told.json()["state"]) == (202, "cancelled")
    await server.client.post(f"/checkpoints/{job_id}/cancel")
    waited = await server.client.get(f"/checkpoints/{job_id}", params={"wait": 4})
    assert waited.json()["state"] == "cancelled"  # the store's own time-out is 5 s
    await assert_nothing_left(server)


async def test_a_flipped_bit_on_the_way_down_is_fetched_again(server, proxy):
    assert (await ended(server, await trigger(server)))["state"] == "completed"
    await server.terminate()
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.start()
    proxy.add(Rule(method="GET", path=CHUNKS, action=FlipBit(offset=100), times=1))
    content = (await server.client.get(f"{LOG}/records?from_lsn=1")).content
    assert unframe(content) == [bytes([number]) * 60_000 for number in range(4)]


async def test_bit_rot_on_the_store_is_told_with_its_key(server, proxy):
    assert (await ended(server, await trigger(server)))["state"] == "completed"
    await server.terminate()
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.start()
    proxy.add(Rule(method="GET", path=CHUNKS, action=FlipBit(offset=100), times=None))
    answer = await server.client.get(f"{LOG}/records?from_lsn=1")
    assert answer.status_code == 500
    problem = answer.json()
    assert problem["code"] == "corrupt_blob"
    assert "chunk-" in json.dumps(problem)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "disk"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(target)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs here")
    yield target
    subprocess.run(["umount", "-l", str(target)], check=True, capture_output=True)


async def test_a_full_disk_refuses_appends_and_goes_on_with_room(
    make_server: MakeServer, small_disk: Path, tmp_path: Path
):
    server = make_server(
        settings={
            "BOP_DATA_DIR": str(small_disk / "data"),
            "BOP_REMOTE_URL": f"file://{tmp_path / 'remote'}",
        }
    )
    await server.start()
    await server.client.put(LOG, json={"engine": "append_only"})
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 * 1024 * 1024))
    kept: list[bytes] = []
    answer = None
    for number in range(64):
        record = bytes([number]) * 200_000
        answer = await server.client.post(
            f"{LOG}/records", content=frame([record]), headers={"Content-Type": RECORDS}
        )
        if answer.status_code != 201:
            break
        kept.append(record)
    assert answer is not None
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")
    assert int(answer.headers["Retry-After"]) >= 1
    assert (await server.client.get(LOG)).json()["next_lsn"] == len(kept) + 1
    ballast.unlink()
    answer = await server.client.post(
        f"{LOG}/records", content=frame([b"room again"]), headers={"Content-Type": RECORDS}
    )
    assert answer.status_code == 201, answer.text
    content = (await server.client.get(f"{LOG}/records?from_lsn=1")).content
    assert unframe(content) == [*kept, b"room again"]
    await server.kill9()
    await server.start()
    content = (await server.client.get(f"{LOG}/records?from_lsn=1")).content
    assert unframe(content) == [*kept, b"room again"]


async def test_no_room_to_stage_fails_early_and_leaves_nothing(
    make_server: MakeServer, small_disk: Path, tmp_path: Path
) -> None:
    """Row 3 at the height of the service: the job says `disk_full`, and the next one, with room
    again, covers all of it.
    """
    server = make_server(
        settings={
            "BOP_DATA_DIR": str(small_disk / "data"),
            "BOP_REMOTE_URL": f"file://{tmp_path / 'remote'}",
            "BOP_JOB_ATTEMPTS": "1",
        }
    )
    await server.start()
    client = server.client
    await client.put(LOG, json={"engine": "append_only", "compression": "zstd"})
    records = [os.urandom(100_000) for _ in range(20)]
    answer = await client.post(
        f"{LOG}/records", content=frame(records), headers={"Content-Type": RECORDS}
    )
    assert answer.status_code == 201, answer.text
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(16 * 1024)):
                pass
        except OSError:
            pass
    os.truncate(ballast, ballast.stat().st_size - 256 * 1024)  # for the manifest to go on
    job = await ended(server, await trigger(server))
    assert (job["state"], job["error"]["code"]) == ("failed", "disk_full"), job
    await assert_nothing_left(server)
    assert (await client.get(LOG)).json()["generation"] == 0
    ballast.unlink()
    job = await ended(server, await trigger(server))
    assert (job["state"], job["result"]["last_lsn"]) == ("completed", 20), job
    await assert_nothing_left(server)
