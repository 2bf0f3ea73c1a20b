"""Conditional and range requests (RFC 9110, sections 13 and 14) over one strong ETag. Pure."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request

from app.core.base.errors import PreconditionFailed, RangeNotSatisfiable

CONDITION_PARAMETERS: tuple[dict[str, Any], ...] = tuple(
    {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}
    for name, text in (
        ("Range", "One range of bytes; several are answered with the whole."),
        ("If-Range", "Honour `Range` only if this is the ETag."),
        ("If-Match", "412 unless this is the ETag."),
        ("If-None-Match", "304 if this is the ETag."),
    )
)
"""For the OpenAPI document."""

REPLACING_PARAMETERS: tuple[dict[str, Any], ...] = tuple(
    {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}
    for name, text in (
        ("If-Match", "412 unless this is the ETag of what is replaced."),
        ("If-None-Match", "`*`: 412 unless there is nothing yet."),
    )
)

_ONE_RANGE = re.compile(r"bytes[ \t]*=[ \t]*(?:([0-9]+)-([0-9]*)|-([0-9]+))[ \t]*", re.IGNORECASE)
_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
_CONDITIONS = frozenset({b"if-match", b"if-none-match", b"if-range", b"range"})
_EACH_TAG = re.compile(_TAG)


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """[first, stop) of `size` bytes; never empty."""

    first: int
    stop: int
    size: int

    @property
    def length(self) -> int:
        return self.stop - self.first

    @property
    def content_range(self) -> str:
        return f"bytes {self.first}-{self.stop - 1}/{self.size}"


Kept = Literal["whole", "not_modified"]
Answer = Kept | Literal["precondition_failed", "unsatisfiable"] | ByteRange


def parse_range(header: str | None, *, size: int) -> ByteRange | Literal["unsatisfiable"] | None:
    """None: no range to honour. That is also so for several ranges, other units and what is no
    range at all: a server may ignore them, and the whole is a right answer to each.
    """
    found = _ONE_RANGE.fullmatch(header.strip()) if header is not None else None
    if found is None:
        return None
    first_text, last_text, suffix_text = found.groups()
    if suffix_text is not None:
        length = min(_bounded(suffix_text), size)
        first, stop = size - length, size
    else:
        first = _bounded(first_text)
        stop = size if not last_text else min(_bounded(last_text) + 1, size)
        if last_text and _bounded(last_text) < first:
            return None  # malformed, says RFC 9110
    if first >= stop:
        return "unsatisfiable"
    return ByteRange(first=first, stop=stop, size=size)


def decide(
    *,
    etag: str,
    size: int,
    method: str,
    if_match: str | None,
    if_none_match: str | None,
    if_range: str | None,
    range_header: str | None,
) -> Answer:
    """In the order of RFC 9110, section 13.2.2. `etag` is strong, quotes included."""
    if if_match is not None and not _matches(if_match, etag, weakly=False):
        return "precondition_failed"
    if if_none_match is not None and _matches(if_none_match, etag, weakly=True):
        return "not_modified"
    if method != "GET" or (if_range is not None and if_range.strip() != etag):
        return "whole"
    return parse_range(range_header, size=size) or "whole"


def check_replacing(request: Request, *, etag: str, exists: bool) -> None:
    """For what replaces the resource. Raises PreconditionFailed."""
    if_match = request.headers.get("if-match")
    if if_match is not None:
        any_will_do = if_match.strip() == "*"
        if not (exists if any_will_do else _matches(if_match, etag, weakly=False)):
            raise PreconditionFailed("If-Match names another state.", etag=etag)
    if_none_match = request.headers.get("if-none-match")
    if if_none_match is not None:
        any_is_wrong = if_none_match.strip() == "*"
        if exists if any_is_wrong else _matches(if_none_match, etag, weakly=True):
            raise PreconditionFailed("If-None-Match names this state.", etag=etag)


def _matches(header: str, etag: str, *, weakly: bool) -> bool:
    """A list that is none matches nothing."""
    header = header.strip()
    if header == "*":
        return True
    if _TAGS.fullmatch(header) is None:
        return False
    tags = _EACH_TAG.findall(header)
    return etag in ([tag.removeprefix("W/") for tag in tags] if weakly else tags)


def _bounded(digits: str) -> int:
    """Numbers longer than any file only need to be larger than it (and int() limits digits)."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= 19 else 10**19


def answer_to(request: Request, *, etag: str, size: int) -> ByteRange | Kept:
    """What the request's headers ask for. Raises PreconditionFailed, RangeNotSatisfiable."""
    if _CONDITIONS.isdisjoint(name for name, _ in request.scope["headers"]):
        return "whole"
    headers = request.headers
    answer = decide(
        etag=etag,
        size=size,
        method=request.method,
        if_match=headers.get("if-match"),
        if_none_match=headers.get("if-none-match"),
        if_range=headers.get("if-range"),
        range_header=headers.get("range"),
    )
    match answer:
        case "precondition_failed":
            raise PreconditionFailed("If-Match names another state.", etag=etag)
        case "unsatisfiable":
            raise RangeNotSatisfiable(f"There are {size} bytes.", size=size)
        case _:
            return answer
