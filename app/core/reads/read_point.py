"""One state of a database, held for reading.

Invariants: I4, I5: what a point shows ends on a commit, and its WAL segments stay until it is
released. I8: its generation is told to be in use (`GenerationPins`), so that nothing of it is
collected under a reader.
Concurrency: loop-confined. Cancellation: release it in a `finally`, or use it as a context.
Crash: pins are memory only; so are the readers.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from app.core.base.errors import GenerationExpired
from app.core.reads.wal_pages import WalPages
from app.core.stores.manifest.records import DatabaseRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPoint:
    """The content of a database at `lsn`: `page_count` pages.

    `generation` 0: nothing is published of it yet. Without `wal` it is that generation's state.
    `database` is the row as it was when the point was made.
    """

    database: DatabaseRecord
    generation: int
    lsn: int
    page_count: int
    published_page_count: int
    """Of the generation. Blobs may hold pages beyond it, from before the database shrank: they are
    not its content (I5), and one that grew again without writing them reads as zeros."""
    wal: WalPages | None
    _on_release: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def page_size(self) -> int:
        return self.database.page_size

    @property
    def size_bytes(self) -> int:
        return self.page_count * self.database.page_size

    @property
    def pages_per_chunk(self) -> int:
        return self.database.chunk_bytes // self.database.page_size

    def on_release(self, action: Callable[[], None]) -> None:
        self._on_release.append(action)

    def release(self) -> None:
        """Again is harmless."""
        while self._on_release:
            self._on_release.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class GenerationPins:
    """Generations that readers use now: not to be collected, whatever retention says."""

    def __init__(self) -> None:
        self._pins: dict[int, Counter[int]] = {}
        self._closed: set[tuple[int, int]] = set()

    def pin(self, db_id: int, generation: int) -> Callable[[], None]:
        """Returns what takes the pin away again; to be called once. Raises GenerationExpired for
        one that is being collected.
        """
        if (db_id, generation) in self._closed:
            raise GenerationExpired(
                f"Generation {generation} is no longer retained.", generation=generation
            )
        pins = self._pins.setdefault(db_id, Counter())
        pins[generation] += 1

        def unpin() -> None:
            pins[generation] -= 1
            if not pins[generation]:
                del pins[generation]
            if not pins and self._pins.get(db_id) is pins:
                del self._pins[db_id]

        return unpin

    def close(self, db_id: int, generation: int) -> Callable[[], None] | None:
        """For the collector: nobody begins on the generation until what is returned is called;
        None if someone reads it. Once closed, its row may go without pulling it from under a
        reader that looked before.
        """
        if generation in self._pins.get(db_id, ()):
            return None
        place = (db_id, generation)
        self._closed.add(place)
        return lambda: self._closed.discard(place)

    def generations(self, db_id: int) -> frozenset[int]:
        return frozenset(self._pins.get(db_id, ()))

    def is_pinned(self, db_id: int) -> bool:
        return db_id in self._pins
