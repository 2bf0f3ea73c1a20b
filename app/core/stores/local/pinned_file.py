"""A file of the hot cache that stays readable, even if it is unlinked meanwhile."""

import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

from app.core.base.errors import CorruptBlob


class PinnedFile:
    """Open until closed, by `close` or on leaving it as a context.

    Reads use pread and may run side by side in a pool; end or abandon them before closing.
    """

    __slots__ = ("_on_close", "descriptor", "sha256", "size_bytes")

    def __init__(
        self, descriptor: int, *, sha256: str, size_bytes: int, on_close: Callable[[], None]
    ) -> None:
        self.descriptor = descriptor
        self.sha256 = sha256
        self.size_bytes = size_bytes
        self._on_close = on_close

    def __repr__(self) -> str:
        return f"<PinnedFile {self.sha256[:12]} {'open' if self.descriptor >= 0 else 'closed'}>"

    def read_blocking(self, offset: int, size_bytes: int) -> bytes:
        """Exactly these bytes; CorruptBlob if the file ends before them. Checks no checksum."""
        data = os.pread(self.descriptor, size_bytes, offset)
        while len(data) < size_bytes:
            more = os.pread(self.descriptor, size_bytes - len(data), offset + len(data))
            if not more:
                raise CorruptBlob(
                    "A cached blob is shorter than it should be.",
                    sha256=self.sha256,
                    offset=offset,
                    wanted_bytes=size_bytes,
                    found_bytes=len(data),
                )
            data += more
        return data

    def close(self) -> None:
        """Again is harmless."""
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)
            self._on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
