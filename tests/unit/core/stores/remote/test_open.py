"""URLs of the remote store, and the decorators around it."""

from pathlib import Path

import pytest

from app.core.base.errors import StartRefused
from app.core.stores.remote.open import DirectoryPlace, RemoteOptions, S3Place, parse_remote_url
from app.core.stores.remote.protocol import BlobMissing
from tests.helpers.remote import EventLog, bytes_body, opened_remote


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("s3://bucket", S3Place(bucket="bucket", prefix="")),
        ("s3://bucket/", S3Place(bucket="bucket", prefix="")),
        ("s3://my.bucket-1/a/b/", S3Place(bucket="my.bucket-1", prefix="a/b")),
        ("file:///var/x", DirectoryPlace(path=Path("/var/x"))),
        ("file://localhost/var/x", DirectoryPlace(path=Path("/var/x"))),
        ("file:///with%20space", DirectoryPlace(path=Path("/with space"))),
    ],
)
def test_urls(url: str, place: S3Place | DirectoryPlace) -> None:
    assert parse_remote_url(url) == place


@pytest.mark.parametrize(
    "url",
    ["", "/path", "http://host/x", "s3://", "s3://Bucket", "s3://b/x", "s3://bucket/../x",
     "s3://bucket/a//b", "s3://key:secret@bucket/x", "s3://bucket?x=1", "file://host/x", "file:x"],
)  # fmt: skip
def test_urls_that_cannot_be_one(url: str) -> None:
    with pytest.raises(StartRefused):
        parse_remote_url(url)


async def test_every_request_is_told(tmp_path: Path) -> None:
    log = EventLog()
    async with opened_remote(f"file://{tmp_path / 'r'}", log=log) as store:
        await store.put_blob("a", bytes_body(b"12345"))
        await store.get_blob("a", first=1, length=2)
        [piece async for piece in store.iter_blob("a")]
        with pytest.raises(BlobMissing):
            await store.get_blob("none")
        await store.put_if_absent("a", bytes_body(b"other"))
        [info async for info in store.list_blobs("")]
        await store.delete_blobs(["a"])
    told = [
        (entry["op"], entry["outcome"], entry["bytes_read"], entry["bytes_written"])
        for entry in log.named("remote.requested")
    ]
    assert told == [
        ("put_blob", "ok", 0, 5), ("get_blob", "ok", 2, 0), ("get_blob", "ok", 5, 0),
        ("get_blob", "ok", 0, 0), ("put_if_absent", "ok", 0, 0), ("head_blob", "ok", 0, 0),
        ("list_blobs", "ok", 0, 0), ("delete_blobs", "ok", 0, 0),
    ]  # fmt: skip


async def test_opening_an_s3_store_asks_it_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    options = RemoteOptions(endpoint_url="http://127.0.0.1:9", addressing="path")
    async with opened_remote("s3://bucket/prefix", options) as store:
        assert "s3://bucket/prefix/" in repr(store)
