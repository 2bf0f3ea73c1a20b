"""Numbers as people read them. Pure."""

import re
from datetime import UTC, datetime

_UNITS = {"B": 0, "KIB": 1, "MIB": 2, "GIB": 3, "TIB": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def bytes_text(count: int) -> str:
    """1 536 bytes as '1.5 KiB'."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes everything")


def parse_bytes(text: str) -> int:
    """'1.5 KiB' as 1536. Raises ValueError."""
    found = _SIZE.fullmatch(text.strip())
    power = _UNITS.get(found[2].upper() or "B") if found is not None else None
    if found is None or power is None:
        raise ValueError(f"{text!r} is no size; write bytes, or as in 10GiB.")
    return round(float(found[1]) * 1024**power) if "." in found[1] else int(found[1]) << 10 * power


def plain_text(text: str, *, one_line: bool = False) -> str:
    """What others wrote, without what a terminal would obey: control characters and turns of
    direction are spelled out.
    """
    return "".join(
        one
        if one.isprintable() or (one == "\n" and not one_line)
        else one.encode("unicode_escape").decode()
        for one in text
    )


def seconds_text(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def rate_text(count: int, seconds: float) -> str:
    return f"{bytes_text(round(count / seconds))}/s" if seconds > 0 else "-"


def count_text(count: int | None) -> str:
    return "-" if count is None else f"{count:,}"


def time_text(moment: datetime | None) -> str:
    return "-" if moment is None else f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%SZ}"


def lsns_text(first_lsn: int | None, last_lsn: int | None) -> str:
    """An inclusive range; LSNs are names, so no separators."""
    if first_lsn is None or last_lsn is None or last_lsn < first_lsn:
        return "-"
    return str(first_lsn) if first_lsn == last_lsn else f"{first_lsn}-{last_lsn}"
