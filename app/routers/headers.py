"""Request headers that mean something here, parsed strictly. Pure."""

import re
from collections.abc import Sequence
from hashlib import blake2b

from app.core.base.errors import InvalidRequest, NotAcceptable
from app.routers.exchange import Principal

_VISIBLE_ASCII = re.compile(r"[\x21-\x7e]{1,255}")
_NEXT_LSN = re.compile(r'"([0-9]{1,19})"')
_QUALITY = re.compile(r"q=(0(\.[0-9]{0,3})?|1(\.0{0,3})?)")


def invalid_header(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(
        f"{name}: {message}",
        errors=[{"loc": ["header", name], "msg": message, "type": "header"}],
    )


def expected_next_lsn(if_match: str | None) -> int | None:
    """`If-Match: "<next_lsn>"`. Raises InvalidRequest for anything else."""
    if if_match is None:
        return None
    found = _NEXT_LSN.fullmatch(if_match.strip())
    if found is None:
        raise invalid_header("If-Match", 'takes one next_lsn in double quotes, like "42".')
    return int(found.group(1))


def checked_idempotency_key(key: str | None) -> str | None:
    """Raises InvalidRequest."""
    if key is not None and _VISIBLE_ASCII.fullmatch(key) is None:
        raise invalid_header("Idempotency-Key", "takes 1 to 255 visible ASCII characters.")
    return key


def scope_hash(principal: Principal, *, route: str, key: str) -> bytes:
    """What an Idempotency-Key is unique in: the principal and the route with its names.

    Parts are length-prefixed, so that no two different triples hash alike.
    """
    digest = blake2b(digest_size=16)
    for part in (principal.name.encode(), route.encode(), key.encode()):
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


def media_type_of(content_type: str | None) -> str:
    """The media type alone, in lower case, without parameters."""
    return (content_type or "").partition(";")[0].strip().lower()


def negotiated(accept: str | None, offered: Sequence[str]) -> str:
    """The offered type that `Accept` likes best; among equals the first offered (RFC 9110,
    section 12.5.1). Raises NotAcceptable.
    """
    if accept is None or not accept.strip():
        return offered[0]
    ranges = [_media_range(part) for part in accept.split(",") if part.strip()]
    best, best_quality = "", 0.0
    for media_type in offered:
        quality = _quality_of(media_type, ranges)
        if quality > best_quality:
            best, best_quality = media_type, quality
    if not best:
        raise NotAcceptable("None of the media types in Accept is offered.", offered=list(offered))
    return best


def _media_range(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        if found := _QUALITY.fullmatch(parameter):
            quality = float(found.group(1))
    return name, quality


def _quality_of(media_type: str, ranges: Sequence[tuple[str, float]]) -> float:
    """The most specific range that matches decides."""
    main = media_type.partition("/")[0]
    for pattern in (media_type, f"{main}/*", "*/*"):
        found = [quality for name, quality in ranges if name == pattern]
        if found:
            return max(found)
    return 0.0
