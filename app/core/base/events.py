"""One surface for what happens: logs and metrics both listen here.

Events are named `<noun>.<past tense>` (`checkpoint.published`) and carry plain values. Sinks must
not block and must not raise.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]
Sink = Callable[[str, Level, Mapping[str, object]], None]

event_context: ContextVar[dict[str, object] | None] = ContextVar("event_context", default=None)
"""What every event of a request or a job belongs to: `request_id`, `trace_id`, `span_id`,
`job_id`, `tenant`, `database`. The edge makes one for a request, the runner one for a job; threads
of the pools work in it, too.
"""


def context_fields() -> Mapping[str, object]:
    return event_context.get() or {}


@contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Events told within belong to these, too."""
    token = event_context.set({**context_fields(), **fields})
    try:
        yield
    finally:
        event_context.reset(token)


class Events:
    """Fans an event out to its sinks, in order, in the caller's thread."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = list(sinks)

    def subscribe(self, sink: Sink) -> None:
        self._sinks.append(sink)

    def debug(self, name: str, /, **fields: object) -> None:
        self._emit(name, "debug", fields)

    def info(self, name: str, /, **fields: object) -> None:
        self._emit(name, "info", fields)

    def warning(self, name: str, /, **fields: object) -> None:
        self._emit(name, "warning", fields)

    def error(self, name: str, /, **fields: object) -> None:
        self._emit(name, "error", fields)

    def _emit(self, name: str, level: Level, fields: Mapping[str, object]) -> None:
        for sink in self._sinks:
            sink(name, level, fields)
