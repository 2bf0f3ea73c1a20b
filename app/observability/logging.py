"""Log lines: every event, and what the libraries log, as JSON (or for a console).

A line carries what the request or the job it belongs to is called (`request_id`, `trace_id`,
`job_id`, `tenant`), taken from the context it was emitted in. Bodies, tokens and record contents
are never fields of an event.
"""

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, BinaryIO, Literal, TextIO

import msgspec
import structlog

from app.core.base.errors import StartRefused
from app.core.base.events import Level, Sink, context_fields

_START_REFUSED = f"{StartRefused.__module__}.{StartRefused.__qualname__}"
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_REFUSED_REQUEST = "Invalid HTTP request received."
"""Uvicorn's words."""
_SECRET_FIELDS = frozenset({"authorization", "token", "body", "payload"})
"""Leases have a fencing `token`; it proves nothing to outsiders, but a rule without exceptions
is easier to keep.
"""


def log_sink(
    *,
    log_format: Literal["json", "console"],
    level: Level,
    stream: BinaryIO | None = None,
) -> Sink:
    """A sink for Events, writing whole lines to `stream` (standard output by default)."""
    logger = _bound(log_format, level, stream)
    least = _LEVELS[level]

    def sink(name: str, at: Level, fields: Mapping[str, object]) -> None:
        if _LEVELS[at] >= least:
            getattr(logger, at)(name, **_renamed(fields))

    return sink


def route_library_logs(sink: Sink, *, level: Level) -> None:
    """Sends the standard library's loggers (uvicorn's, asyncio's) through the sink."""
    root = logging.getLogger()
    root.handlers[:] = [_SinkHandler(sink)]
    root.setLevel(max(_LEVELS[level], logging.INFO))
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers[:] = []
        logger.propagate = True
    for name in ("botocore", "aiobotocore", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


_REFUSED_START = re.compile(
    rf"^Traceback .*^{re.escape(_START_REFUSED)}: ", re.DOTALL | re.MULTILINE
)


class _SinkHandler(logging.Handler):
    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and type(error).__name__ in {"ResponseBroken", "StartRefused"}:
            return  # told where it happened, as an event
        message = record.getMessage()
        if message == _REFUSED_REQUEST:
            return  # told as `http.refused`, with its request's name
        if _REFUSED_START.search(message):
            return  # told likewise; Starlette makes a text of its traceback
        level: Level = "error" if record.levelno >= logging.ERROR else "info"
        if record.levelno == logging.WARNING:
            level = "warning"
        fields: dict[str, object] = {"logger": record.name, "detail": message}
        if error is not None:
            fields["exception"] = error
        self._sink("library.logged", level, fields)


def _bound(
    log_format: Literal["json", "console"], level: Level, stream: BinaryIO | None
) -> structlog.typing.FilteringBoundLogger:
    processors: list[structlog.typing.Processor] = [
        _add_context,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        structlog.processors.format_exc_info,
    ]
    factory: Any
    if log_format == "json":
        processors.append(structlog.processors.JSONRenderer(serializer=_encode))
        factory = structlog.BytesLoggerFactory(stream or sys.stdout.buffer)
    else:
        text: TextIO = sys.stdout
        processors.append(structlog.dev.ConsoleRenderer(colors=text.isatty()))
        factory = structlog.PrintLoggerFactory(text)
    bound: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        factory(),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        cache_logger_on_first_use=True,
    )
    return bound


def _renamed(fields: Mapping[str, object]) -> dict[str, Any]:
    """Fields of an event, without secrets, and with an exception where structlog looks for it."""
    shown: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _SECRET_FIELDS:
            continue
        if isinstance(value, BaseException):
            shown["exc_info"] = value
        elif name == "event":
            shown["event_"] = value
        else:
            shown[name] = value
    return shown


def _add_context(
    logger: Any, method: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """What the event itself says counts."""
    del logger, method
    for name, value in context_fields().items():
        event.setdefault(name, value)
    return event


def _encode(event: Any, **options: Any) -> bytes:
    del options
    return msgspec.json.encode(event, enc_hook=str)
