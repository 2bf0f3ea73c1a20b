"""The demo's data: an access log as JSON lines, the same for the same seed. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass

from app.core.base.clock import SeededRandomness

_SERVICES = ("checkout", "catalogue", "search", "accounts", "payments", "shipping", "media", "edge")
_PATHS = ("/v1/orders", "/v1/items", "/v1/search", "/v1/users", "/v1/baskets", "/v2/quotes", "/img")
_METHODS = ("GET", "GET", "GET", "POST")
_OUTCOMES = (
    (200, "INFO", "served"),
    (200, "INFO", "served from cache"),
    (201, "INFO", "created"),
    (304, "INFO", "not modified"),
    (404, "WARN", "no such item"),
    (409, "WARN", "conflicting update, client told to retry"),
    (500, "ERROR", "upstream closed the connection before the answer was complete"),
    (200, "INFO", "served"),
)
_START_SECONDS = 1_760_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class LogBatch:
    body: bytes
    """JSON lines, the last with its newline too."""
    count: int


def iter_log(*, seed: int, total_bytes: int, batch_bytes: int) -> Iterator[LogBatch]:
    """At least `total_bytes` of log, in batches of about `batch_bytes`."""
    bits = SeededRandomness(seed).bits
    number = made_bytes = 0
    while made_bytes < total_bytes:
        lines: list[str] = []
        wanted = min(batch_bytes, total_bytes - made_bytes)
        size = 0
        while size < wanted:
            line = _line(number, bits(128))
            lines.append(line)
            size += len(line)
            number += 1
        made_bytes += size
        yield LogBatch(body="".join(lines).encode(), count=len(lines))


def _line(number: int, bits: int) -> str:
    status, level, message = _OUTCOMES[bits & 7]
    second, micro = divmod(number * 1_137, 1_000_000)
    return (
        f'{{"ts":{_START_SECONDS + second}.{micro:06d},"level":"{level}",'
        f'"service":"{_SERVICES[bits >> 3 & 7]}","host":"node-{bits >> 6 & 15:02d}",'
        f'"method":"{_METHODS[bits >> 10 & 3]}","path":"{_PATHS[(bits >> 12 & 255) % 7]}/'
        f'{bits >> 20 & 0xFFFFF}","status":{status},"duration_us":{bits >> 40 & 0x3FFFF},'
        f'"bytes":{bits >> 58 & 0xFFFF},"user":"u{bits >> 74 & 0xFFFF}",'
        f'"trace":"{bits:032x}","msg":"{message}"}}\n'
    )
