"""How rows become bytes and back, this version's and the two before it.

A record is a msgpack array whose first element is its schema version, so that the version is
known before anything else is decoded.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from app.core.base.errors import FormatFromFuture
from app.core.stores.manifest.errors import CorruptRow, FormatTooOld
from app.core.stores.manifest.records import SCHEMA_VERSION, Record

V = TypeVar("V")
R = TypeVar("R", bound=Record)

VERSIONS_READ_BEFORE = 2
_FIXARRAY_FIRST, _FIXARRAY_LAST, _ARRAY16 = 0x90, 0x9F, 0xDC

Upgrader = Callable[[list[Any]], list[Any]]
"""Takes a record's fields as version v wrote them and gives them as version v + 1 means them."""

# ValueError: bytes that are no UTF-8; RecursionError: nested without end.
_NOT_OURS = (msgspec.MsgspecError, IndexError, ValueError, RecursionError)

_encode = msgspec.msgpack.Encoder().encode
_decode_untyped = msgspec.msgpack.Decoder().decode


class Codec(Protocol[V]):
    def encode(self, value: V) -> bytes: ...

    def decode(self, raw: bytes) -> V: ...


class RecordCodec(Generic[R]):
    """`upgraders` are keyed by the version they start from; without one, that step only appended
    fields.
    """

    def __init__(
        self,
        kind: type[R],
        *,
        version: int = SCHEMA_VERSION,
        upgraders: Mapping[int, Upgrader] | None = None,
    ) -> None:
        self._kind = kind
        self._version = version
        self._upgraders = dict(upgraders or {})
        self._decoder = msgspec.msgpack.Decoder(kind)

    def encode(self, value: R) -> bytes:
        return _encode(value)

    def decode(self, raw: bytes) -> R:
        try:
            if peek_version(raw) == self._version:
                return self._decoder.decode(raw)
            return self._decode_other(raw)
        except _NOT_OURS as error:
            raise CorruptRow(f"A {self._kind.__name__} does not decode: {error}.") from error

    def _decode_other(self, raw: bytes) -> R:
        fields = _decode_untyped(raw)
        if not isinstance(fields, list) or not fields or type(fields[0]) is not int:
            raise CorruptRow(f"A {self._kind.__name__} does not begin with its schema version.")
        written_by: int = fields[0]
        if written_by > self._version:
            raise FormatFromFuture(
                f"A {self._kind.__name__} has schema version {written_by}; "
                f"this version knows up to {self._version}.",
                schema_version=written_by,
            )
        if written_by < self._version - VERSIONS_READ_BEFORE:
            raise FormatTooOld(
                f"A {self._kind.__name__} has schema version {written_by}.",
                schema_version=written_by,
            )
        for version in range(written_by, self._version):
            if upgrade := self._upgraders.get(version):
                fields = upgrade(fields)
            fields[0] = version + 1
        return msgspec.convert(fields, self._kind)


def peek_version(raw: bytes) -> int | None:
    """None where the version is not a small number in its usual place."""
    first = raw[0]
    if _FIXARRAY_FIRST < first <= _FIXARRAY_LAST:
        version = raw[1]
    elif first == _ARRAY16:
        version = raw[3]
    else:
        return None
    return version if version < 0x80 else None


class BytesCodec:
    def encode(self, value: bytes) -> bytes:
        return value

    def decode(self, raw: bytes) -> bytes:
        return raw


class AppendsCodec(Generic[V]):
    """Rows that are no record of their own: a tuple of small structs behind a version."""

    def __init__(self, kind: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[tuple[int, V]] = msgspec.msgpack.Decoder(
            tuple[int, kind]
        )

    def encode(self, value: V) -> bytes:
        return _encode((SCHEMA_VERSION, value))

    def decode(self, raw: bytes) -> V:
        try:
            version = peek_version(raw)
            if version is not None and version > SCHEMA_VERSION:
                raise FormatFromFuture("Remembered appends of a newer version.")
            return self._decoder.decode(raw)[1]
        except _NOT_OURS as error:
            raise CorruptRow(f"Remembered appends do not decode: {error}.") from error
