"""Takes a download into the hot cache, hashing it in the pass that writes it."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from app.core.base.errors import CorruptBlob
from app.core.base.events import Events
from app.core.base.tasks import BlockingPool, uninterrupted
from app.core.stores.local.cache_files import CachedFile, CacheFiles


class CacheWriter:
    """Made by `HotCache.writer`. A disk that cannot take the bytes is no error of the download:
    they are hashed all the same, and `commit` answers False.
    """

    def __init__(
        self,
        files: CacheFiles,
        *,
        sha256: str,
        size_bytes: int,
        pool: BlockingPool,
        events: Events,
        on_commit: Callable[[CachedFile], None],
        wanted: bool,
    ) -> None:
        self._files = files
        self._sha256 = sha256
        self._size_bytes = size_bytes
        self._pool = pool
        self._events = events
        self._on_commit = on_commit
        self._keeping = wanted
        self._hash = hashlib.sha256()
        self._written = 0
        self._part: Path | None = None
        self._file: BinaryIO | None = None

    async def write(self, piece: bytes) -> None:
        """Raises CorruptBlob as soon as there are more bytes than there should be."""
        self._written += len(piece)
        if self._written > self._size_bytes:
            raise self._corrupt()
        await uninterrupted(self._pool.run(self._write_blocking, piece))

    async def commit(self) -> bool:
        """True: it is in the cache. Raises CorruptBlob if the bytes are not what they should be."""
        if self._written != self._size_bytes or self._hash.hexdigest() != self._sha256:
            raise self._corrupt()
        return await uninterrupted(self._commit())

    async def aclose(self) -> None:
        """Removes what was not committed."""
        await uninterrupted(self._pool.run(self._discard_blocking))

    async def _commit(self) -> bool:
        file = await self._pool.run(self._name_blocking)
        if file is None:
            return False
        self._on_commit(file)
        return True

    def _write_blocking(self, piece: bytes) -> None:
        self._hash.update(piece)
        if not self._keeping:
            return
        try:
            if self._file is None:
                self._part = self._files.new_part_blocking()
                self._file = self._part.open("wb")
            self._file.write(piece)
        except OSError as error:
            self._give_up_blocking(error)

    def _name_blocking(self) -> CachedFile | None:
        if not self._keeping:
            return None
        try:
            if self._file is None or self._part is None:  # an empty blob
                self._part = self._files.new_part_blocking()
                self._file = self._part.open("wb")
            self._file.close()
            return self._files.name_blocking(self._part, self._sha256, self._size_bytes)
        except OSError as error:
            self._give_up_blocking(error)
            return None

    def _give_up_blocking(self, error: OSError) -> None:
        self._keeping = False
        self._events.warning("hot_cache.not_admitted", sha256=self._sha256, error=str(error))
        self._discard_blocking()

    def _discard_blocking(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with suppress(OSError):  # what is buffered may not fit; it is to go anyway
                file.close()
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None

    def _corrupt(self) -> CorruptBlob:
        return CorruptBlob(
            "A downloaded blob does not match its SHA-256 and size.",
            sha256=self._sha256,
            expected_bytes=self._size_bytes,
            found_bytes=self._written,
        )
