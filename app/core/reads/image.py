"""A database as the bytes of its SQLite file."""

from collections.abc import AsyncGenerator, Iterable

from app.core.base.errors import GenerationExpired, NoGeneration
from app.core.reads.page_store import PageStore
from app.core.reads.read_point import ReadPoint
from app.core.stores.manifest.records import GenerationRecord


async def iter_image(
    store: PageStore, point: ReadPoint, *, first: int, stop: int
) -> AsyncGenerator[memoryview, None]:
    """The bytes [first, stop) of the file, in pieces of at most 1 MiB; only their pages are read.
    Raises what `PageStore.read_page` does.
    """
    size = point.page_size
    assert 0 <= first <= stop <= point.size_bytes
    if first == stop:
        return
    runs = store.iter_pages(point, first // size + 1, (stop - 1) // size + 1)
    try:
        async for run in runs:
            start = (run.first - 1) * size
            yield run.data[max(first - start, 0) : stop - start]
    finally:
        await runs.aclose()


def generation_at(
    retained: Iterable[GenerationRecord], at_us: int, *, first_ever: int = 1
) -> GenerationRecord:
    """The newest generation that was committed by then, from those retained, ascending; pure.
    `first_ever` is the number of the first one that the database had: a fork begins with another.

    Raises GenerationExpired where that one is gone (an older one is no answer), NoGeneration where
    none was committed by then.
    """
    found: GenerationRecord | None = None
    first: GenerationRecord | None = None
    for record in retained:
        first = first or record
        if record.committed_at_us <= at_us:
            found = record
    if found is None:
        if first is not None and first.generation > first_ever:
            raise GenerationExpired("What was newest then is no longer retained.")
        raise NoGeneration("Nothing had been published by then.")
    if found.superseded_at_us is not None and found.superseded_at_us <= at_us:
        raise GenerationExpired(
            "What was newest then is no longer retained.", generation=found.generation + 1
        )
    return found
