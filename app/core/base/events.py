"""One surface for what happens: logs and metrics both listen here.

Events are named `<noun>.<past tense>` (`checkpoint.published`) and carry plain values. Sinks must
not block and must not raise.
"""

from collections.abc import Callable, Mapping
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]
Sink = Callable[[str, Level, Mapping[str, object]], None]


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
