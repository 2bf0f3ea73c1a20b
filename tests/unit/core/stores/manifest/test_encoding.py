"""Rows of this version, of the two before it, and of none."""

from typing import Any

import msgspec
import pytest

from app.core.base.errors import FormatFromFuture
from app.core.stores.manifest.encoding import AppendsCodec, RecordCodec
from app.core.stores.manifest.errors import CorruptRow, FormatTooOld
from app.core.stores.manifest.records import Record, RememberedAppend
from app.core.stores.manifest.tables import JOBS, number_key, number_of
from tests.unit.core.stores.manifest.builders import job


class Version1(Record, array_like=True, frozen=True, kw_only=True):
    schema_version: int = 1
    name: str


class Version3(Record, array_like=True, frozen=True, kw_only=True):
    schema_version: int = 3
    name: str
    size_bytes: int  # version 2 wrote KiB here
    note: str = "none"


def to_2(fields: list[Any]) -> list[Any]:
    return [*fields, 4]


def to_3(fields: list[Any]) -> list[Any]:
    return [*fields[:2], fields[2] * 1024, *fields[3:]]


CODEC = RecordCodec(Version3, version=3, upgraders={1: to_2, 2: to_3})


@pytest.mark.parametrize(
    "stored",
    [
        [1, "x"],
        [2, "x", 4],
        [3, "x", 4096],
        [3, "x", 4096, "none", "a field of a later release of the same version"],
    ],
)
def test_the_two_versions_before_are_read(stored: list[Any]) -> None:
    raw = msgspec.msgpack.encode(stored)
    assert CODEC.decode(raw) == Version3(name="x", size_bytes=4096)


def test_a_step_without_an_upgrader_only_appended() -> None:
    codec = RecordCodec(Version3, version=3, upgraders={1: to_2})
    assert codec.decode(msgspec.msgpack.encode([1, "x"])) == Version3(name="x", size_bytes=4)


@pytest.mark.parametrize("version", [4, 200, 70_000])
def test_a_newer_version_is_refused(version: int) -> None:
    with pytest.raises(FormatFromFuture, match=str(version)):
        CODEC.decode(msgspec.msgpack.encode([version, {"all": "new"}]))


def test_a_version_before_those_is_refused() -> None:
    with pytest.raises(FormatTooOld):
        CODEC.decode(msgspec.msgpack.encode([0, "x"]))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x90",
        b"\x93",
        b"\x93\x03\xa1x",
        b"\xdc",
        msgspec.msgpack.encode({"a": 1}),
        msgspec.msgpack.encode(["3", "x", 1]),
        msgspec.msgpack.encode([3, 5, 5]),
        b"\x93\x03\xa1\xff\x01",
        b"\x91" * 100_000,
    ],
)
def test_bytes_that_no_version_wrote(raw: bytes) -> None:
    with pytest.raises(CorruptRow):
        CODEC.decode(raw)


def test_wide_records_have_their_version_in_another_place() -> None:
    raw = JOBS.codec.encode(job())
    assert raw[0] == 0xDC
    assert JOBS.codec.decode(raw) == job()
    newer = msgspec.msgpack.encode([2, *msgspec.msgpack.decode(raw)[1:]])
    with pytest.raises(FormatFromFuture):
        JOBS.codec.decode(newer)


def test_remembered_appends_have_a_version_too() -> None:
    codec: AppendsCodec[Any] = AppendsCodec(tuple[RememberedAppend, ...])
    assert codec.decode(codec.encode(())) == ()
    with pytest.raises(FormatFromFuture):
        codec.decode(msgspec.msgpack.encode((2, ())))
    with pytest.raises(CorruptRow):
        codec.decode(msgspec.msgpack.encode((1, 5)))
    for raw in (b"", b"rubbish", msgspec.msgpack.encode({"a": 1})):
        with pytest.raises(CorruptRow):
            codec.decode(raw)


def test_a_number_that_is_none() -> None:
    assert number_of(number_key(7)) == 7
    with pytest.raises(CorruptRow):
        number_of(b"\x07")
