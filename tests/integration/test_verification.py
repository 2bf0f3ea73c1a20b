"""Verification and downloads on objects that are really damaged or gone."""

import random
import shutil
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from app.container import fsck
from app.core.formats.record_framing import pack_records
from app.core.stores.remote.s3_client import S3Options, open_client
from app.settings import Settings
from tests.conftest import MakeServer
from tests.helpers.failpoints import kill_at
from tests.helpers.scans import content, scan
from tests.helpers.seaweed import SeaweedS3
from tests.helpers.server import ServerProcess
from tests.helpers.wait import wait_until

DATABASE = "/tenants/acme/databases/app"
CHUNK_BYTES = 65536
NAMED = {"tenant": "acme", "database": "app"}


async def make(client: httpx.AsyncClient, *, chunks: int = 6) -> list[str]:
    """An append_only database of that many chunks; their keys."""
    body = {"engine": "append_only", "chunk_bytes": CHUNK_BYTES}
    assert (await client.put(DATABASE, json=body)).status_code == 201
    source = random.Random(1)
    for _ in range(chunks):
        records = pack_records([source.randbytes(6000) for _ in range(9)])
        answer = await client.post(
            f"{DATABASE}/records", content=records,
            headers={"Content-Type": "application/vnd.bop.records"},
        )  # fmt: skip
        assert answer.status_code == 201
    result = (await finished(client, "/checkpoints", {}))["result"]
    return [chunk["blob_key"] for chunk in result["chunks"]]


async def finished(client: httpx.AsyncClient, path: str, fields: dict) -> dict:
    answer = await client.post(path, json={**NAMED, **fields})
    assert answer.status_code == 202, answer.text
    base = "/checkpoints" if path == "/checkpoints" else "/jobs"
    assert answer.headers["location"] == f"{base}/{answer.json()['id']}"
    job = (await client.get(answer.headers["location"], params={"wait": 60})).json()
    assert job["state"] in {"completed", "failed"}
    return job


async def verified(client: httpx.AsyncClient, **fields: object) -> dict:
    job = await finished(client, "/admin/verifications", fields)
    assert job["kind"] == "verify_manifest"
    return job


async def health(client: httpx.AsyncClient) -> str:
    return (await client.get(DATABASE)).json()["health"]["state"]


async def verified_at(client: httpx.AsyncClient, generation: int = 1) -> str | None:
    items = (await client.get(f"{DATABASE}/generations")).json()["items"]
    return next(one for one in items if one["generation"] == generation)["verified_at"]


async def metric(client: httpx.AsyncClient, outcome: str) -> float:
    name = f'verified_blobs_total{{outcome="{outcome}"}}'
    lines = (await client.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])


def damage(path: Path) -> None:
    """As bit rot would: the object is replaced, whoever holds a link to the old file keeps it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.unlink()
    path.write_bytes(bytes(data))


async def check_fsck(server: ServerProcess) -> None:
    await server.terminate()
    report = await fsck(Settings(data_dir=server.data_dir))
    assert report.findings == ()


async def test_a_sound_generation_is_verified(server: ServerProcess):
    client = server.client
    keys = await make(client)
    assert await verified_at(client) is None
    job = await verified(client)
    assert job["state"] == "completed"
    assert job["result"] == {
        "outcome": "verified", "generation": 1, "blobs": len(keys), "verified_blobs": len(keys),
        "verified_bytes": job["progress"]["total_bytes"], "repaired_blobs": 0, "damaged_blobs": 0,
        "findings": [],
    }  # fmt: skip
    assert job["progress"]["staged_chunks"] == job["progress"]["total_chunks"] == len(keys)
    assert await verified_at(client) is not None
    assert await metric(client, "ok") == len(keys)
    await check_fsck(server)


async def test_damaged_and_missing_blobs_are_mended_from_the_hot_cache(server: ServerProcess):
    """Fault rows 35 and 36, where a local copy is right."""
    client = server.client
    keys = await make(client)
    remote = server.data_dir / "remote"
    before = {key: (remote / key).read_bytes() for key in keys}
    damage(remote / keys[1])
    (remote / keys[3]).unlink()
    (remote / keys[4]).write_bytes(before[keys[4]][:-1])
    job = await verified(client, generation=1)
    assert job["state"] == "completed", job
    assert job["result"]["repaired_blobs"] == 3
    assert {(one["key"], one["outcome"]) for one in job["result"]["findings"]} == {
        (keys[number], "repaired") for number in (1, 3, 4)
    }
    assert {key: (remote / key).read_bytes() for key in keys} == before
    assert await verified_at(client) is not None
    assert await health(client) == "ok"
    assert await metric(client, "repaired") == 3
    assert content(await scan(client))
    await check_fsck(server)


async def test_what_cannot_be_mended_makes_the_generation_unhealthy(server: ServerProcess):
    """Fault rows 35 and 36, without a local copy, and with one that is damaged as well."""
    client = server.client
    keys = await make(client)
    remote, cache = server.data_dir / "remote", server.data_dir / "hot_cache"
    before = {key: (remote / key).read_bytes() for key in keys}
    names = {key: key.rpartition("-")[2].removesuffix(".blob") for key in keys}
    await server.terminate()
    for number in (0, 2):
        (cached,) = cache.rglob(names[keys[number]])
        cached.unlink()
    (cached,) = cache.rglob(names[keys[4]])
    damage(cached)
    await server.start()
    client = server.client
    damage(remote / keys[0])
    (remote / keys[2]).unlink()
    damage(remote / keys[4])
    job = await verified(client)
    assert job["state"] == "failed"
    error = job["error"]
    assert (error["code"], error["status"], error["damaged"]) == ("corrupt_blob", 500, 3)
    assert {(one["key"], one["outcome"]) for one in job["result"]["findings"]} == {
        (keys[0], "damaged"), (keys[2], "missing"), (keys[4], "damaged"),
    }  # fmt: skip
    assert job["result"]["verified_blobs"] == len(keys)
    assert await health(client) == "unhealthy_generation"
    assert await verified_at(client) is None
    assert "verification.damaged" in server.log_tail()
    answer = await client.post(  # nothing else stops
        f"{DATABASE}/records", content=b"on", headers={"Content-Type": "application/octet-stream"}
    )
    assert answer.status_code == 201
    await server.restart()
    client = server.client
    assert await health(client) == "unhealthy_generation"

    for key, data in before.items():  # an operator brought them back
        (remote / key).parent.mkdir(parents=True, exist_ok=True)
        (remote / key).write_bytes(data)
    assert (await verified(client))["state"] == "completed"
    assert await health(client) == "ok"
    await check_fsck(server)


async def killed_at(server: ServerProcess, path: str, name: str, *, nth: int) -> str:
    """The id of the job during which the process was killed."""
    await server.restart(failpoints=kill_at(name, nth=nth))
    job_id = (await server.client.post(path, json=NAMED)).json()["id"]
    assert await server.wait_exit() == -9
    await server.start(failpoints={})
    return job_id


async def test_a_verification_goes_on_after_a_crash(server: ServerProcess):
    """What the ledger has is not read again; a blob that was being mended is mended."""
    keys = await make(server.client, chunks=8)
    job_id = await killed_at(server, "/admin/verifications", "verify.after_record", nth=5)
    job = (await server.client.get(f"/jobs/{job_id}", params={"wait": 60})).json()
    assert job["state"] == "completed", job
    assert job["result"]["verified_blobs"] == len(keys)
    assert await metric(server.client, "ok") == len(keys) - 5

    blob = server.data_dir / "remote" / keys[2]
    sound = blob.read_bytes()
    damage(blob)
    job_id = await killed_at(server, "/admin/verifications", "verify.before_repair", nth=1)
    job = (await server.client.get(f"/jobs/{job_id}", params={"wait": 60})).json()
    assert job["state"] == "completed", job
    assert (job["result"]["repaired_blobs"], blob.read_bytes()) == (1, sound)
    await check_fsck(server)


async def test_a_download_goes_on_after_a_crash(server: ServerProcess):
    keys = await make(server.client)
    await server.terminate()
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.start()
    job_id = await killed_at(server, "/admin/downloads", "download.mid_blob", nth=3)
    job = (await server.client.get(f"/jobs/{job_id}", params={"wait": 60})).json()
    assert job["state"] == "completed", job
    assert job["result"]["outcome"] == "hydrated"
    assert (await cached(server.client))["entries"] == len(keys)
    await check_fsck(server)


async def test_what_cannot_be_verified_or_downloaded(server: ServerProcess):
    client = server.client
    for path in ("/admin/verifications", "/admin/downloads"):
        answer = await client.post(path, json=NAMED)
        assert (answer.status_code, answer.json()["code"]) == (404, "database_not_found")
    body = {"engine": "append_only"}
    assert (await client.put(DATABASE, json=body)).status_code == 201
    for path in ("/admin/verifications", "/admin/downloads"):
        answer = await client.post(path, json=NAMED)
        assert (answer.status_code, answer.json()["code"]) == (409, "no_generation")
        answer = await client.post(path, json={**NAMED, "generation": 0})
        assert answer.status_code == 422
        answer = await client.post(path, json={**NAMED, "more": 1})
        assert answer.status_code == 422


async def test_an_idempotency_key_gives_the_first_job_again(server: ServerProcess):
    client = server.client
    await make(client, chunks=1)
    headers = {"Idempotency-Key": "one"}
    first = await client.post("/admin/verifications", json=NAMED, headers=headers)
    again = await client.post("/admin/verifications", json=NAMED, headers=headers)
    assert again.json() == first.json()
    other = await client.post(
        "/admin/verifications", json={**NAMED, "generation": 1}, headers=headers
    )
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    download = await client.post("/admin/downloads", json=NAMED, headers=headers)
    assert download.json()["kind"] == "download_checkpoint"


async def downloaded(client: httpx.AsyncClient, **fields: object) -> dict:
    return await finished(client, "/admin/downloads", fields)


async def cached(client: httpx.AsyncClient) -> dict:
    return (await client.get("/debug/cache")).json()["hot_cache"]


async def test_a_download_warms_the_hot_cache(server: ServerProcess):
    keys = await make(server.client)
    await server.terminate()
    shutil.rmtree(server.data_dir / "hot_cache")
    await server.start()
    client = server.client
    assert (await cached(client))["entries"] == 0
    job = await downloaded(client)
    assert job["state"] == "completed", job
    result = job["result"]
    assert result["outcome"] == "hydrated"
    assert (result["downloaded_blobs"], result["cached_blobs"]) == (len(keys), 0)
    stats = await cached(client)
    assert (stats["entries"], stats["used_bytes"]) == (len(keys), result["downloaded_bytes"])
    again = (await downloaded(client))["result"]
    assert (again["downloaded_blobs"], again["cached_blobs"]) == (0, len(keys))
    for key in keys:  # reads need no remote store now
        (server.data_dir / "remote" / key).rename(server.data_dir / "remote" / f"{key}.away")
    answer = await client.get(f"{DATABASE}/records", params={"from_lsn": 1})
    assert answer.status_code == 200
    for key in keys:
        (server.data_dir / "remote" / f"{key}.away").rename(server.data_dir / "remote" / key)
    await check_fsck(server)


async def test_a_download_takes_what_there_is_room_for(make_server: MakeServer):
    server = make_server(settings={"BOP_HOT_CACHE_BYTES": "0"})
    await server.start()
    keys = await make(server.client)
    assert (await downloaded(server.client))["result"]["skipped_blobs"] == len(keys)
    await server.terminate()
    server.settings["BOP_HOT_CACHE_BYTES"] = str(4 * CHUNK_BYTES)
    await server.start()
    result = (await downloaded(server.client))["result"]
    assert result["outcome"] == "partial"
    assert 2 <= result["downloaded_blobs"] < len(keys)
    assert result["downloaded_blobs"] + result["skipped_blobs"] == len(keys)
    stats = await cached(server.client)
    assert stats["entries"] == result["downloaded_blobs"]
    assert stats["used_bytes"] <= 4 * CHUNK_BYTES
    await check_fsck(server)


@pytest.mark.parametrize("gone", [False, True])
async def test_a_damaged_blob_is_never_admitted(make_server: MakeServer, gone: bool):
    server = make_server(settings={"BOP_HOT_CACHE_BYTES": "0"})
    await server.start()
    keys = await make(server.client, chunks=3)
    await server.terminate()
    server.settings["BOP_HOT_CACHE_BYTES"] = str(64 * CHUNK_BYTES)
    await server.start()
    blob = server.data_dir / "remote" / keys[1]
    sound = blob.read_bytes()
    if gone:
        blob.unlink()
    else:
        damage(blob)
    job = await downloaded(server.client)
    assert job["state"] == "failed"
    assert (job["error"]["code"], job["error"]["key"]) == ("corrupt_blob", keys[1])
    name = keys[1].rpartition("-")[2].removesuffix(".blob")
    assert list((server.data_dir / "hot_cache").rglob(name)) == []
    assert list((server.data_dir / "hot_cache" / "incoming").iterdir()) == []
    blob.write_bytes(sound)
    assert (await downloaded(server.client))["result"]["outcome"] == "hydrated"
    await check_fsck(server)


async def test_a_service_verifies_by_itself_where_it_is_told_to(make_server: MakeServer):
    server = make_server(settings={"BOP_VERIFY_INTERVAL_SECONDS": "0.1"})
    await server.start()
    client = server.client
    await make(client, chunks=2)

    async def ended() -> list:
        wanted = {"kind": "verify_manifest", "state": "completed"}
        return (await client.get("/jobs", params=wanted)).json()["items"]

    jobs = await wait_until(ended)
    assert await verified_at(client) is not None
    assert [(job["reason"], job["result"]["outcome"]) for job in jobs] == [
        ("scheduled", "verified")
    ]
    await check_fsck(server)


async def test_objects_of_a_bucket_are_mended(
    make_server: MakeServer, seaweed: SeaweedS3, monkeypatch: pytest.MonkeyPatch
):
    """Fault rows 35 and 36 on S3: one object is overwritten, one deleted."""
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    bucket = seaweed.bucket()
    server = make_server(
        settings={
            "BOP_REMOTE_URL": f"s3://{bucket}/kept",
            "BOP_S3_ENDPOINT_URL": seaweed.endpoint,
            **seaweed.environment(),
        }
    )
    await server.start()
    client = server.client
    keys = await make(client, chunks=4)
    options = S3Options(bucket=bucket, endpoint_url=seaweed.endpoint, region=seaweed.region)
    async with AsyncExitStack() as stack:
        s3 = await open_client(stack, options)
        await s3.put_object(Bucket=bucket, Key=f"kept/{keys[0]}", Body=b"something else")
        await s3.delete_object(Bucket=bucket, Key=f"kept/{keys[2]}")
    job = await verified(client)
    assert job["state"] == "completed", job
    assert {one["key"] for one in job["result"]["findings"]} == {keys[0], keys[2]}
    assert job["result"]["repaired_blobs"] == 2
    assert (await verified(client))["result"]["repaired_blobs"] == 0
    report = (await client.get("/debug/manifest/fsck")).json()
    assert report["findings"] == []
