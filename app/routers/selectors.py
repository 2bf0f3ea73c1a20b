"""`?generation=`, `?snapshot=`, `?at=`: which state of a database is meant. At most one of them."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.requests import Request

from app.core.base.errors import InvalidRequest
from app.core.base.ids import is_name
from app.core.services.states import AtGeneration, AtSnapshot, AtTime, Newest, StateSelector
from app.routers.schemas import EXAMPLE_TIME, NAME_PATTERN

GENERATION_MAX = 2**63 - 1
_NUMBER = re.compile(r"[0-9]{1,19}")
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}"
    r"(\.[0-9]{1,9})?([Zz]|[+\- ][0-9]{2}:[0-9]{2})"
)
_SELECTORS = frozenset({"generation", "snapshot", "at"})
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

GENERATION_PARAMETER: dict[str, Any] = {
    "name": "generation",
    "in": "query",
    "description": "That generation; by default the newest committed state, WAL included.",
    "schema": {"type": "integer", "minimum": 1, "maximum": GENERATION_MAX},
}
SNAPSHOT_PARAMETER: dict[str, Any] = {
    "name": "snapshot",
    "in": "query",
    "description": "The generation that the snapshot pins.",
    "schema": {"type": "string", "pattern": NAME_PATTERN},
}
AT_PARAMETER: dict[str, Any] = {
    "name": "at",
    "in": "query",
    "description": f"The newest generation committed by then, like {EXAMPLE_TIME}.",
    "schema": {"type": "string", "format": "date-time"},
}


def selector_of(request: Request, *, takes_time: bool) -> StateSelector:
    """Raises InvalidRequest."""
    if not request.scope["query_string"]:
        return Newest()
    query = request.query_params
    given = [(name, value) for name, value in query.multi_items() if name in _SELECTORS]
    if not given:
        return Newest()
    if given[0][0] == "at" and not takes_time:
        raise _invalid("at", "only images are read as of a time; choose a generation here")
    if len(given) > 1:
        raise _invalid(given[-1][0], "one of generation, snapshot and at, once")
    name, value = given[0]
    match name:
        case "generation":
            return AtGeneration(checked_number(value, name=name, maximum=GENERATION_MAX))
        case "snapshot":
            if not is_name(value):
                raise _invalid(name, f"String should match pattern '{NAME_PATTERN}'")
            return AtSnapshot(value)
        case _:
            return AtTime(_time_us(value))


def checked_number(text: str, *, name: str, maximum: int, place: str = "query") -> int:
    """From 1 on. Raises InvalidRequest."""
    if _NUMBER.fullmatch(text) is None or not 1 <= int(text) <= maximum:
        raise _invalid(name, f"Input should be an integer from 1 to {maximum}", place=place)
    return int(text)


def _time_us(text: str) -> int:
    found = _TIME.fullmatch(text)
    if found is None:
        raise _invalid("at", f"a time with its zone, like {EXAMPLE_TIME}")
    # Whatever follows the microseconds is cut: it comes before that time, not after.
    head, fraction, zone = text[:19].upper(), found.group(1) or "", found.group(2)
    zone = zone.upper().replace(" ", "+")  # a "+" that was not escaped
    try:
        time = datetime.fromisoformat(f"{head}{fraction[:7]}{zone}")
        return (time - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError) as error:
        raise _invalid("at", f"no such time: {error}") from error


def _invalid(name: str, message: str, *, place: str = "query") -> InvalidRequest:
    return InvalidRequest(
        f"{name}: {message}.",
        errors=[{"loc": [place, name], "msg": message, "type": "value_error"}],
    )
