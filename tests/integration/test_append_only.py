"""append_only databases end to end: the real service, real SeaweedFS, real losses."""

import asyncio
import json
import random
import shutil

import httpx
import pytest
from aiobotocore.session import get_session

from app.container import fsck
from app.core.formats.crc64 import crc64, decode_crc64
from app.core.formats.record_framing import pack_records
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.failpoints import kill_at
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until
from tests.helpers.workload import RECORDS, frame, scratch_left, unframe

MIB = 1024 * 1024
LOG = "/tenants/acme/databases/log"


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


async def create(client: httpx.AsyncClient, path: str = LOG, **fields: object) -> dict:
    answer = await client.put(path, json={"engine": "append_only", **fields})
    assert answer.status_code in {200, 201}, answer.text
    return answer.json()


async def append(client: httpx.AsyncClient, records: list[bytes], path: str = LOG) -> dict:
    answer = await client.post(
        f"{path}/records", content=pack_records(records), headers={"Content-Type": RECORDS}
    )
    assert answer.status_code == 201, answer.text
    return answer.json()


async def read(client: httpx.AsyncClient, path: str = LOG, first: int = 1) -> list[bytes]:
    answer = await client.get(f"{path}/records", params={"from_lsn": first})
    assert answer.status_code == 200, answer.text
    return unframe(answer.content)


async def checkpoint(client: httpx.AsyncClient, database: str = "log") -> dict:
    answer = await client.post("/checkpoints", json={"tenant": "acme", "database": database})
    assert answer.status_code == 202, answer.text
    assert answer.headers["Location"] == f"/checkpoints/{answer.json()['id']}"
    job = (await client.get(f"/checkpoints/{answer.json()['id']}?wait=60")).json()
    assert job["state"] == "completed", job
    return job


async def test_checkpoint_append_only_roundtrip(
    make_server: MakeServer, seaweed: SeaweedS3, bucket: str
):
    server = make_server(settings=s3_settings(seaweed, bucket))
    await server.start()
    await create(server.client)
    shapes = random.Random(7)
    records = [shapes.randbytes(shapes.randrange(0, 65_536)) for _ in range(2_000)]
    total = 0
    for at in range(0, len(records), 100):
        batch = records[at : at + 100]
        told = await append(server.client, batch)
        assert (told["first_lsn"], told["last_lsn"]) == (at + 1, at + 100)
        assert told["bytes"] == sum(map(len, batch))
        total += told["bytes"]
    assert total > 60 * MIB

    job = await checkpoint(server.client)
    result = job["result"]
    assert (result["outcome"], result["generation"]) == ("published", 1)
    assert (result["first_lsn"], result["last_lsn"]) == (1, len(records))
    assert {chunk["action"] for chunk in result["chunks"]} == {"seal_as_base"}
    database = (await server.client.get(LOG)).json()
    assert (database["generation"], database["checkpointed_lsn"]) == (1, len(records))
    assert database["wal_bytes"] == 0
    await assert_blobs_on_s3(seaweed, bucket, result["chunks"])
    changes = (await server.client.get("/debug/manifest/change_log")).json()["items"]
    upserts = [op for change in changes for op in change["ops"] if op["type"] == "UpsertChunk"]
    assert len(upserts) == len(result["chunks"])

    await server.restart()
    assert await read(server.client) == records

    await server.terminate()
    shutil.rmtree(server.data_dir / "hot_cache")
    shutil.rmtree(server.data_dir / "wal")
    await server.start()
    assert await read(server.client) == records
    assert await read(server.client, first=1_501) == records[1_500:]

    await server.terminate()
    shutil.rmtree(server.data_dir)
    await run_recover(server)
    await server.start()
    recovered = (await server.client.get(LOG)).json()
    assert recovered["checkpointed_lsn"] == len(records)
    assert recovered["next_lsn"] == len(records) + 1 + (1 << 32)
    assert await read(server.client) == records
    told = await append(server.client, [b"after the loss"])
    assert told["first_lsn"] == len(records) + 1 + (1 << 32)
    again = await checkpoint(server.client)
    assert again["result"]["generation"] == 2
    await server.terminate()
    await assert_clean(server)


async def assert_blobs_on_s3(seaweed: SeaweedS3, bucket: str, chunks: list[dict]) -> None:
    async with get_session().create_client(
        "s3",
        endpoint_url=seaweed.endpoint,
        region_name=seaweed.region,
        aws_access_key_id=seaweed.access_key,
        aws_secret_access_key=seaweed.secret_key,
    ) as client:
        for chunk in chunks:
            key = f"prod/{chunk['blob_key']}"
            head = await client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
            assert head["ContentLength"] == chunk["bytes"]
            body = await (await client.get_object(Bucket=bucket, Key=key))["Body"].read()
            assert decode_crc64(head["ChecksumCRC64NVME"]) == crc64(body)


async def run_recover(server: ServerProcess) -> None:
    await server.start(wait="launched", arguments=("recover",))
    assert await server.wait_exit() == 0, server.log_tail()


async def assert_clean(server: ServerProcess) -> None:
    """fsck of the stopped service's directory finds nothing."""
    names = {name.removeprefix("BOP_").lower(): value for name, value in server.settings.items()}
    known = {name: value for name, value in names.items() if name in Settings.model_fields}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.settings.items():
            if name.startswith("AWS_"):
                environment.setenv(name, value)
        report = await fsck(Settings(**known))
    assert report.findings == ()
    assert report.checked["databases"] >= 1


async def test_job_queue_resume_after_crash(
    make_server: MakeServer, seaweed: SeaweedS3, bucket: str
):
    server = make_server(settings=s3_settings(seaweed, bucket))
    await server.start(failpoints=kill_at("upload.after_put", nth=2))
    await create(server.client, chunk_bytes=65_536)
    records = [bytes([number]) * 20_000 for number in range(20)]
    for record in records:
        await append(server.client, [record])
    answer = await server.client.post("/checkpoints", json={"tenant": "acme", "database": "log"})
    job_id = answer.json()["id"]
    await server.wait_exit()

    await server.start(failpoints={})
    job = (await server.client.get(f"/checkpoints/{job_id}?wait=30")).json()
    assert job["state"] == "completed", job
    assert job["attempts"] == 1  # a restart uses none up
    assert job["result"]["last_lsn"] == 20
    assert await read(server.client) == records
    assert scratch_left(server.data_dir) == []
    assert (await server.client.get("/debug/checkpoint/leases")).json()["items"] == []
    generations = (await server.client.get(f"{LOG}/generations")).json()["items"]
    assert [one["generation"] for one in generations] == [1]
    await server.terminate()
    await assert_clean(server)


@pytest.mark.parametrize("compression", ["none", "zstd", "lz4"])
async def test_every_codec_reads_back_from_the_bucket_alone(
    make_server: MakeServer, compression: str
):
    server = make_server()
    await server.start()
    await create(server.client, compression=compression, chunk_bytes=65_536)
    records = [json.dumps({"n": n, "text": "a line of a log " * 8}).encode() for n in range(3_000)]
    await append(server.client, records)
    job = await checkpoint(server.client)
    if compression != "none":
        assert job["result"]["bytes_uploaded"] < sum(map(len, records)) / 2
    await server.terminate()
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.start()
    assert await read(server.client) == records
    lines = await server.client.get(
        f"{LOG}/records", params={"from_lsn": 10, "to_lsn": 2_990},
        headers={"Accept": "application/x-ndjson"},
    )  # fmt: skip
    assert lines.content == b"".join(record + b"\n" for record in records[9:2_990])
    await server.terminate()
    await assert_clean(server)


async def test_a_second_checkpoint_uploads_only_what_is_new(server: ServerProcess):
    await create(server.client)
    await append(server.client, [b"x" * 1000] * 1000)
    first = await checkpoint(server.client)
    await append(server.client, [b"y" * 10])
    second = await checkpoint(server.client)
    third = await checkpoint(server.client)
    assert first["result"]["bytes_uploaded"] > MIB * 0.9
    assert second["result"]["bytes_uploaded"] < 1000
    assert third["result"]["outcome"] == "no_changes"
    assert third["result"]["chunks"] == []
    assert third["result"]["generation"] == 2
    durable = (await server.client.get(f"{LOG}/durable", params={"min_lsn": 1001})).json()
    assert durable == {"durable_lsn": 1001, "checkpointed_lsn": 1001}


async def test_reads_run_on_while_the_wal_under_them_is_published(server: ServerProcess):
    await create(server.client, chunk_bytes=MIB)
    records = [bytes([number % 256]) * 10_000 for number in range(2_000)]
    for at in range(0, len(records), 200):
        await append(server.client, records[at : at + 200])
    async with server.client.stream("GET", f"{LOG}/records?from_lsn=1") as answer:
        pieces = answer.aiter_bytes()
        received = [await anext(pieces)]
        await checkpoint(server.client)
        received += [piece async for piece in pieces]
    assert unframe(b"".join(received)) == records


async def test_a_long_poll_is_answered_by_the_next_record(server: ServerProcess):
    await create(server.client)
    await append(server.client, [b"one"])
    started = await server.client.get(f"{LOG}/records?from_lsn=2")
    assert (started.status_code, started.content) == (200, b"")
    assert started.headers["Bop-Next-Lsn"] == "2"
    async with httpx.AsyncClient(base_url=server.base_url, timeout=30) as other:
        poll = other.build_request("GET", f"{LOG}/records?from_lsn=2&wait=20")
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(other.send(poll))
            await append(server.client, [b"two"])
        assert unframe(waiting.result().content) == [b"two"]


async def test_events_follow_a_checkpoint_to_its_end(server: ServerProcess):
    await create(server.client)
    await append(server.client, [b"x"] * 10)
    job = (
        await server.client.post("/checkpoints", json={"tenant": "acme", "database": "log"})
    ).json()
    names, last = [], ""
    async with server.client.stream("GET", f"/checkpoints/{job['id']}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            if line.startswith("event:"):
                names.append(line.removeprefix("event:").strip())
            elif line.startswith("data:"):
                last = line.removeprefix("data:")
    assert names[-1] == "ended"
    assert json.loads(last)["state"] == "completed"


async def test_the_same_checkpoint_request_again_gives_the_same_answer(server: ServerProcess):
    await create(server.client)
    await append(server.client, [b"x"])
    body = {"tenant": "acme", "database": "log", "reason": "nightly"}
    headers = {"Idempotency-Key": "night-1"}
    first = await server.client.post("/checkpoints", json=body, headers=headers)
    await wait_until(lambda: _ended(server, first.json()["id"]))
    again = await server.client.post("/checkpoints", json=body, headers=headers)
    assert (again.status_code, again.json()) == (first.status_code, first.json())
    await server.kill9()
    await server.start()
    after_crash = await server.client.post("/checkpoints", json=body, headers=headers)
    assert after_crash.json() == first.json()
    other = await server.client.post("/checkpoints", json={**body, "reason": "x"}, headers=headers)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert len((await server.client.get("/checkpoints")).json()["items"]) == 1


async def _ended(server: ServerProcess, job_id: str) -> bool:
    job = (await server.client.get(f"/checkpoints/{job_id}")).json()
    return job["state"] == "completed"


async def test_keyed_appends_happen_once_over_restart_and_wal_removal(server: ServerProcess):
    await create(server.client)
    headers = {"Content-Type": RECORDS, "Idempotency-Key": "order-17"}
    body = frame([b"once", b"only"])

    async def send(content: bytes = body) -> httpx.Response:
        return await server.client.post(f"{LOG}/records", content=content, headers=headers)

    first = await send()
    assert first.status_code == 201
    assert (await send()).json() == first.json()
    await server.kill9()
    await server.start()
    assert (await send()).json() == first.json()
    await checkpoint(server.client)
    await server.restart()
    assert (await server.client.get(LOG)).json()["wal_bytes"] == 0
    assert (await send()).json() == first.json()
    other = await send(frame([b"another body"]))
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert await read(server.client) == [b"once", b"only"]
