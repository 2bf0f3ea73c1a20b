"""A file whose SHA-256 and CRC-64 are taken over the very bytes that are written (I2)."""

import hashlib
from dataclasses import dataclass
from typing import BinaryIO

from app.core.formats.crc64 import crc64


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    sha256: bytes
    crc64: int
    bytes: int


class HashedOutput:
    """Writes, and hashes what it wrote in the same pass."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._crc64 = 0
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._crc64 = crc64(data, self._crc64)
        self.bytes += len(data)

    def digest(self) -> FileDigest:
        return FileDigest(sha256=self._sha256.digest(), crc64=self._crc64, bytes=self.bytes)
