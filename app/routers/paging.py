"""Pages of lists: `?limit=`, an opaque `?cursor=`, `next_cursor` and the `Link` header.

A cursor says which list gave it out: in another one its key would name a place that means nothing,
and the answer would be a page that looks right.
"""

import base64
import binascii
import zlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Depends, Query, Request, Response

from app.core.base.errors import InvalidRequest

LIMIT_DEFAULT = 100
LIMIT_MAX = 1000
NUMBER_MAX = 2**63

T = TypeVar("T")
K = TypeVar("K")


class Page:
    """What part of a list was asked for."""

    def __init__(self, *, limit: int, cursor: str | None, path: str) -> None:
        self.limit = limit
        self._cursor = cursor
        self._path = path

    def after(self, kind: type[K]) -> K | None:
        """The key of the last item of the page before. Raises InvalidRequest."""
        return None if self._cursor is None else decode_cursor(self._cursor, kind, path=self._path)

    def cut(
        self, found: Sequence[T], key: Callable[[T], Any], *, request: Request, response: Response
    ) -> tuple[Sequence[T], str | None]:
        """The page and its next cursor, from one item more than the page holds.

        Sets the `Link` header.
        """
        if len(found) <= self.limit:
            return found, None
        shown = found[: self.limit]
        cursor = encode_cursor(key(shown[-1]), path=self._path)
        url = request.url.include_query_params(cursor=cursor)
        target = f"{url.path}?{url.query}"
        response.headers["Link"] = f'<{target}>; rel="next"'
        return shown, cursor


def page(
    request: Request,
    limit: Annotated[
        int, Query(ge=1, le=LIMIT_MAX, description="How many items at most.")
    ] = LIMIT_DEFAULT,
    cursor: Annotated[
        str | None,
        Query(max_length=512, description="The `next_cursor` of the page before; opaque."),
    ] = None,
) -> Page:
    return Page(limit=limit, cursor=cursor, path=request.url.path)


PageQuery = Annotated[Page, Depends(page)]


def seen_only(
    fetch: Callable[[int, K | None], Sequence[T]],
    *,
    key: Callable[[T], K],
    sees: Callable[[T], bool],
    limit: int,
    after: K | None,
) -> list[T]:
    """Up to `limit` items that the caller may see, over as many fetches as that takes. A cursor
    made from the last of them names nothing hidden (I12).
    """
    seen: list[T] = []
    while True:
        found = fetch(limit, after)
        seen.extend(filter(sees, found))
        if len(found) < limit or len(seen) >= limit:
            return seen[:limit]
        after = key(found[-1])


def encode_cursor(key: Any, *, path: str) -> str:
    """`path` is the list's."""
    raw = msgspec.json.encode((_mark(path), key))
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode_cursor(text: str, kind: type[K], *, path: str) -> K:
    """Raises InvalidRequest."""
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        mark, key = msgspec.json.decode(raw, type=tuple[int, msgspec.Raw])
        if mark != _mark(path):
            raise ValueError("another list's")
        return _checked(msgspec.json.decode(key, type=kind))
    except (binascii.Error, ValueError, RecursionError, msgspec.MsgspecError) as error:
        raise InvalidRequest(
            "The cursor is not one that this list gave out.",
            errors=[{"loc": ["query", "cursor"], "msg": "Not a cursor", "type": "cursor"}],
        ) from error


def _mark(path: str) -> int:
    """Tells lists apart; no secret."""
    return zlib.crc32(path.encode())


def _checked(key: K) -> K:
    """Raises ValueError for what no key can be."""
    if not _is_key(key):
        raise ValueError("a number that no key has")
    return key


def _is_key(value: Any) -> bool:
    """Numbers of keys have 64 bits and no sign."""
    match value:
        case tuple() | list():
            return all(map(_is_key, value))
        case int():
            return 0 <= value < NUMBER_MAX
        case _:
            return True
