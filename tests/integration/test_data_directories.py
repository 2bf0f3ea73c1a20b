"""Data directories of earlier versions are opened, migrated and read; those of later ones are left
alone.

`tests/golden/data-vN/data.tar.xz` holds a stopped service's directory, remote store included, with
its manifest compacted: two databases of two generations each, and WAL that was not published.
v1 was written before the manifest's second schema step. A released one never changes.
"""

import json
import shutil
import sqlite3
import tarfile
from pathlib import Path

import lmdb
import msgspec
import pytest

from migrations.runner import load_steps
from tests.conftest import MakeServer
from tests.helpers.server import ServerEnded, ServerProcess

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ARCHIVES = sorted(GOLDEN.glob("data-v*/data.tar.xz"))
LOG, APP = "/tenants/acme/databases/log", "/tenants/acme/databases/app"
LINES = {"Content-Type": "application/x-ndjson"}
RECORDS = [f"record {part}-{number}" for part in range(2) for number in range(10)]


def extracted(archive: Path, target: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    return target / "data"


def notes_in(image: bytes, path: Path) -> list[str]:
    path.write_bytes(image)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = [text for (text,) in connection.execute("SELECT text FROM notes ORDER BY id")]
    connection.close()
    return found


def notes(count: int) -> list[str]:
    return [f"note {number}" for number in range(count)]


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.parent.name)
async def test_an_earlier_data_directory_is_opened_migrated_and_read(
    make_server: MakeServer, tmp_path: Path, archive: Path
):
    data = extracted(archive, tmp_path)
    server = make_server("data")
    await server.start()
    client = server.client
    read = (await client.get(f"{LOG}/records", headers={"Accept": LINES["Content-Type"]})).text
    assert read.splitlines() == [*RECORDS, "not published yet"]
    assert notes_in((await client.get(f"{APP}/image")).content, tmp_path / "new.db") == notes(150)
    then = await client.get(f"{APP}/image?generation=1")
    assert notes_in(then.content, tmp_path / "then.db") == notes(50)
    # What was remembered of appends still counts, published or not.
    for key, body in (("k1", RECORDS[10:]), ("k2", ["not published yet"])):
        again = await client.post(
            f"{LOG}/records",
            content="".join(f"{line}\n" for line in body),
            headers={**LINES, "Idempotency-Key": key},
        )
        assert (again.status_code, again.json()["count"]) == (201, len(body))
    jobs = (await client.get("/jobs")).json()["items"]
    assert {job["state"] for job in jobs} == {"completed"}
    assert len(jobs) == 4
    await goes_on(server)
    backups = [path for path in data.iterdir() if path.name.startswith("manifest-before-")]
    assert len(backups) == (1 if steps_in(archive) < len(load_steps()) else 0)
    for backup in backups:
        assert (backup / "data.mdb").stat().st_size > 0


async def goes_on(server: ServerProcess) -> None:
    """Appends, publishes, and is whole, also after another restart."""
    client = server.client
    more = await client.post(f"{LOG}/records", content="one more\n", headers=LINES)
    assert more.json()["first_lsn"] == 22
    for name in ("log", "app"):
        asked = {"tenant": "acme", "database": name}
        job = (await client.post("/checkpoints", json=asked)).json()
        ended = (await client.get(f"/checkpoints/{job['id']}?wait=20")).json()
        assert (ended["state"], ended["result"]["generation"]) == ("completed", 3)
    await server.restart()
    report = (await server.client.get("/debug/manifest/fsck")).json()
    assert report["findings"] == []
    assert (await server.client.get(LOG)).json()["next_lsn"] == 23


def steps_in(archive: Path) -> int:
    """Of the schema, that had run when it was written."""
    return {"data-v1": 1}.get(archive.parent.name, len(load_steps()))


async def refused(server: ServerProcess) -> str:
    """What the log says; the directory is as it was."""
    manifest = server.data_dir / "manifest" / "data.mdb"
    before = manifest.read_bytes()
    with pytest.raises(ServerEnded):
        await server.start()
    assert server.exit_code not in {None, 0}
    assert manifest.read_bytes() == before
    lines = [json.loads(line) for line in server.log_path.read_text().splitlines()]
    (told,) = [line for line in lines if line["event"] == "service.start_refused"]
    return str(told["detail"])


async def test_a_manifest_that_a_newer_version_migrated_is_left_alone(
    make_server: MakeServer, tmp_path: Path
):
    data = extracted(ARCHIVES[-1], tmp_path)
    entry = msgspec.msgpack.encode({"name": "from_the_future", "applied_at_us": 1})
    with lmdb.open(str(data / "manifest"), max_dbs=64) as environment:
        schema = environment.open_db(b"schema")
        with environment.begin(write=True, db=schema) as transaction:
            transaction.put(b"migration/9999", entry)
    told = await refused(make_server("data"))
    assert "from_the_future" in told
    assert "Start the newer version, or restore a backup" in told


async def test_a_record_of_a_newer_version_refuses_the_start(
    make_server: MakeServer, tmp_path: Path
):
    """Fault row 50: nothing is guessed of a row that says it is newer."""
    server = make_server("data")
    extracted(ARCHIVES[-1], tmp_path)
    await server.start()  # up to date, so that nothing is migrated below
    await server.terminate()
    server.log_path.unlink()
    with lmdb.open(str(server.data_dir / "manifest"), max_dbs=64) as environment:
        databases = environment.open_db(b"databases")
        with environment.begin(write=True, db=databases) as transaction:
            key, raw = next(iter(transaction.cursor()))
            row = msgspec.msgpack.decode(raw)
            transaction.put(key, msgspec.msgpack.encode([row[0] + 1, *row[1:]]))
    told = await refused(server)
    assert "schema version 2" in told
    assert "Start the newer version" in told


async def test_a_row_that_cannot_be_decoded_is_told_and_costs_only_what_needs_it(
    make_server: MakeServer, tmp_path: Path
):
    server = make_server("data")
    extracted(ARCHIVES[-1], tmp_path)
    await server.start()
    log_id = (await server.client.get(LOG)).json()["db_id"]
    await server.terminate()
    with lmdb.open(str(server.data_dir / "manifest"), max_dbs=64) as environment:
        chunks = environment.open_db(b"chunk_catalog")
        with environment.begin(write=True, db=chunks) as transaction, transaction.cursor() as rows:
            assert rows.set_range(log_id.to_bytes(8, "big"))
            key = rows.key()
            transaction.put(key, b"rubbish")
    await server.start()
    client = server.client
    assert (await client.get("/readyz")).json()["degraded"] == []
    for _ in range(2):
        refused = await client.get(f"{LOG}/records?from=1")
        assert (refused.status_code, refused.json()["code"]) == (500, "internal")
        ready = await client.get("/readyz")
        assert (ready.status_code, ready.json()["degraded"]) == (200, ["manifest"])
    gauges = (await client.get("/metrics")).text
    assert 'service_degraded{part="manifest"} 1.0' in gauges
    assert 'service_degraded{part="remote"} 0.0' in gauges
    assert f'"key":"{key.hex()}"' in server.log_path.read_text()
    assert notes_in((await client.get(f"{APP}/image")).content, tmp_path / "app.db") == notes(150)
    appended = await client.post(f"{LOG}/records", content=b"more\n", headers=LINES)
    assert appended.status_code == 201
    report = (await client.get("/debug/manifest/fsck")).json()
    where = f"manifest/chunk_catalog/{key.hex()}"
    assert [(one["invariant"], one["where"]) for one in report["findings"]] == [("I10", where)]


async def test_the_backup_made_before_migrating_can_be_put_back(
    make_server: MakeServer, tmp_path: Path
):
    data = extracted(ARCHIVES[0], tmp_path)
    server = make_server("data")
    await server.start()
    await server.terminate()
    (backup,) = [path for path in data.iterdir() if path.name.startswith("manifest-before-")]
    shutil.rmtree(data / "manifest")
    backup.rename(data / "manifest")
    await server.start()  # migrates once more
    assert (await server.client.get(LOG)).json()["next_lsn"] == 22
    report = (await server.client.get("/debug/manifest/fsck")).json()
    assert report["findings"] == []
