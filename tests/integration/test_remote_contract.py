"""The remote store on a real S3: the contract, and what only S3 can get wrong."""

import asyncio
import contextlib
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from app.core.base.clock import SeededRandomness, SystemClock
from app.core.base.errors import CorruptBlob
from app.core.base.tasks import BlockingPool
from app.core.formats.crc64 import crc64
from app.core.stores.remote.open import RemoteOptions
from app.core.stores.remote.probe import probe
from app.core.stores.remote.protocol import FileBody, RemoteMisconfigured, RemoteStore
from app.core.stores.remote.requests import Retrier, RetryBudget, RetryPolicy
from app.core.stores.remote.s3 import S3RemoteStore
from app.core.stores.remote.s3_client import S3Options
from tests.helpers.remote import EventLog, bytes_body, file_body, opened_remote
from tests.helpers.remote_contract import RemoteStoreContract
from tests.helpers.seaweed import SeaweedS3

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def _credentials(seaweed: SeaweedS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(seaweed: SeaweedS3) -> str:
    return seaweed.bucket()


@pytest.fixture
async def store(seaweed: SeaweedS3, bucket: str) -> AsyncIterator[RemoteStore]:
    options = RemoteOptions(endpoint_url=seaweed.endpoint, addressing="path")
    async with opened_remote(f"s3://{bucket}/some/prefix", options) as opened:
        yield opened


@pytest.fixture
async def bare(seaweed: SeaweedS3, bucket: str) -> AsyncIterator[S3RemoteStore]:
    """Small limits, so that parts and pages are seen; no decorators."""
    options = S3Options(
        bucket=bucket,
        endpoint_url=seaweed.endpoint,
        addressing="path",
        single_put_bytes_max=8 * MIB,
        part_bytes=5 * MIB,
        list_page_count=7,
    )
    retrier = Retrier(
        RetryPolicy(attempts_max=1), budget=RetryBudget(), clock=SystemClock(),
        randomness=SeededRandomness(1), events=EventLog().events,
    )  # fmt: skip
    async with AsyncExitStack() as stack:
        pool = BlockingPool("test", threads=4)
        stack.callback(pool.close_blocking)
        opened = await S3RemoteStore.open(options, retrier=retrier, pool=pool)
        stack.push_async_callback(opened.aclose)
        yield opened


class TestS3Contract(RemoteStoreContract):
    pass


async def test_keys_lie_below_the_prefix(store: RemoteStore, bare: S3RemoteStore) -> None:
    await store.put_blob("a/b", bytes_body(b"x"))
    assert [info.key async for info in bare.list_blobs("")] == ["some/prefix/a/b"]
    await bare.put_blob("elsewhere", bytes_body(b"y"))
    assert [info.key async for info in store.list_blobs("")] == ["a/b"]


async def test_pages_of_a_listing_join(bare: S3RemoteStore) -> None:
    keys = {f"dir{number % 4}/{number:03d}" for number in range(50)}
    for key in keys:
        await bare.put_blob(key, bytes_body(b"x"))
    found = [info.key async for info in bare.list_blobs("")]
    assert len(found) == 50
    assert set(found) == keys


async def test_a_large_file_goes_up_in_parts(bare: S3RemoteStore, tmp_path: Path) -> None:
    data = os.urandom(17 * MIB + 5)
    info = await bare.put_blob("large", file_body(tmp_path / "large", data))
    assert (info.bytes, info.crc64) == (len(data), crc64(data))
    assert await bare.get_blob("large") == data


async def test_parts_tell_of_their_pieces(bare: S3RemoteStore, tmp_path: Path) -> None:
    told: list[None] = []
    body = file_body(tmp_path / "large", os.urandom(17 * MIB))
    await bare.put_blob("large", msgspec.structs.replace(body, on_moved=lambda: told.append(None)))
    assert len(told) >= 17


async def test_parts_that_do_not_make_the_whole_are_not_completed(
    bare: S3RemoteStore, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(os.urandom(9 * MIB))
    body = FileBody(path=tmp_path / "large", bytes=9 * MIB, crc64=crc64(b"other"))
    with pytest.raises(CorruptBlob):
        await bare.put_blob("large", body)
    assert await bare.head_blob("large") is None
    left = await bare._client.list_multipart_uploads(Bucket=bare._options.bucket)
    assert left.get("Uploads", []) == []


async def test_no_request_waits_for_100_continue(bare: S3RemoteStore, tmp_path: Path) -> None:
    headers: list[dict[str, str]] = []
    bare._client.meta.events.register(
        "before-send.s3", lambda request, **_: headers.append(dict(request.headers))
    )
    await bare.put_blob("file", file_body(tmp_path / "file", os.urandom(3 * MIB)))
    sent = {name.lower(): value for name, value in headers[0].items()}
    assert "expect" not in sent
    assert sent["x-amz-content-sha256"] in {"UNSIGNED-PAYLOAD", b"UNSIGNED-PAYLOAD"}
    assert int(sent["content-length"]) == 3 * MIB
    assert "transfer-encoding" not in sent


async def test_wrong_credentials_are_not_retried(
    seaweed: SeaweedS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    log = EventLog()
    options = RemoteOptions(endpoint_url=seaweed.endpoint, addressing="path")
    async with opened_remote(f"s3://{bucket}", options, log=log) as store:
        with pytest.raises(RemoteMisconfigured):
            await probe(store, randomness=SeededRandomness(1))
    assert log.named("remote.retried") == []


async def test_a_missing_permission_is_named(
    seaweed: SeaweedS3, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader-access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader-secret")
    options = RemoteOptions(endpoint_url=seaweed.endpoint, addressing="path")
    async with opened_remote(f"s3://{bucket}", options) as store:
        with pytest.raises(RemoteMisconfigured, match="s3:PutObject"):
            await store.put_blob("a", bytes_body(b"x"))


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    made, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", made, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    return made, key


async def test_tls_with_a_ca_of_ones_own(
    seaweed: SeaweedS3, bucket: str, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    """The endpoint's certificate is checked against BOP_S3_CA_FILE, and refused without it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    body = file_body(tmp_path / "file", os.urandom(5 * MIB))
    async with tls_before(seaweed, context) as endpoint:
        options = RemoteOptions(endpoint_url=endpoint, addressing="path", ca_file=certificate[0])
        async with opened_remote(f"s3://{bucket}", options) as store:
            await store.put_blob("blob", body)
            assert await store.get_blob("blob") == body.path.read_bytes()
        options = RemoteOptions(endpoint_url=endpoint, addressing="path")
        async with opened_remote(f"s3://{bucket}", options) as store:
            with pytest.raises(RemoteMisconfigured, match="BOP_S3_CA_FILE"):
                await store.head_blob("blob")


@contextlib.asynccontextmanager
async def tls_before(seaweed: SeaweedS3, context: ssl.SSLContext) -> AsyncIterator[str]:
    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while data := await reader.read(MIB):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", seaweed.port)
        await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))

    server = await asyncio.start_server(serve, "localhost", 0, ssl=context)
    async with server:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}"


async def test_an_upload_holds_pieces_not_the_file(store: RemoteStore, tmp_path: Path) -> None:
    """I11: while 4 x 64 MiB go up, the process grows by far less than one of them."""
    body = file_body(tmp_path / "large", os.urandom(MIB) * 64)
    await store.put_blob("warm", body)
    before = _resident_bytes()
    peak = before
    done = False

    async def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, _resident_bytes())
            await asyncio.sleep(0.005)

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        await asyncio.gather(*(store.put_blob(f"large/{number}", body) for number in range(4)))
        done = True
    assert peak - before < 40 * MIB


async def test_the_loop_stays_responsive_during_uploads(store: RemoteStore, tmp_path: Path) -> None:
    body = file_body(tmp_path / "large", os.urandom(MIB) * 64)
    longest, done = 0.0, False

    async def watch() -> None:
        nonlocal longest
        while not done:
            begun = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - begun)
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        await store.put_blob("large", body)
        done = True
    assert longest < 0.25


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
