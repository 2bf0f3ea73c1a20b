"""One request to the service: sent, retried where that is safe, decoded.

Retries: 429, 503 and 507 keep nothing of what they refuse, so every request is sent again after
the longer of `Retry-After` and a jittered backoff. A connection that fails says nothing about the
request's effect: it is sent again only if it is idempotent, by its method or by its key.

Concurrency: any number of calls share one connection pool. Cancellation: a call that is cancelled
closes its connection; what it asked for may have taken effect.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from app.client.failures import ProblemError, ServiceUnreachable, UnexpectedAnswer
from app.client.wire import Page
from app.core.base.clock import Clock, Randomness, full_jitter
from app.core.base.ids import new_ulid

T = TypeVar("T")

Content = bytes | Callable[[], AsyncIterator[bytes]]
"""A body, or what makes it anew for each attempt."""

PROBLEM_TYPE = "application/problem+json"
SHOWN_TEXT_CHARS = 200

_IDEMPOTENT_METHODS = frozenset({"GET", "HEAD", "PUT", "DELETE"})
_REFUSED_WHOLE = frozenset({429, 503, 507})


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    attempts_max: int = 6
    connect_attempts_max: int = 3
    """Where nothing listens, trying on rarely helps, and someone waits to hear of it."""
    backoff_base_seconds: float = 0.2
    backoff_cap_seconds: float = 5.0
    wait_seconds_max: float = 60.0
    """A service that asks for a longer wait than this is not waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    connect_seconds: float = 5.0
    idle_seconds: float = 60.0
    """How long nothing may be read or written, beyond what the request itself asks to wait."""


class Calls:
    def __init__(
        self,
        http: httpx.AsyncClient,
        *,
        clock: Clock,
        randomness: Randomness,
        retry: RetryPolicy,
        timeouts: Timeouts,
    ) -> None:
        self._http = http
        self._clock = clock
        self._randomness = randomness
        self.retry = retry
        self._timeouts = timeouts

    def new_key(self) -> str:
        """An idempotency key: one per effect, the same for all its attempts."""
        return new_ulid(self._clock, self._randomness)

    async def get(
        self,
        path: str,
        answer: type[T],
        *,
        params: Mapping[str, Any] | None = None,
        wait_seconds: float = 0.0,
    ) -> T:
        """`wait_seconds` is sent as `?wait=` where it is not 0."""
        asked = dict(params or {})
        if wait_seconds > 0:
            asked["wait"] = f"{wait_seconds:g}"
        response = await self.send("GET", path, params=asked, wait_seconds=wait_seconds)
        return decoded(response, answer)

    async def pages(
        self, path: str, item: type[T], *, params: Mapping[str, Any], limit: int | None
    ) -> AsyncGenerator[T, None]:
        """The items of a list, page by page, `limit` of them at most."""
        left = limit
        cursor: str | None = None
        while left is None or left > 0:
            asked = {**params, "limit": 1000 if left is None else min(left, 1000)}
            if cursor is not None:
                asked["cursor"] = cursor
            page = await self.get(path, Page[item], params=asked)  # type: ignore[valid-type]
            for one in page.items[:left]:
                yield one
            if left is not None:
                left -= len(page.items)
            cursor = page.next_cursor
            if cursor is None:
                return

    async def send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Mapping[str, Any] | None = None,
        content: Content | None = None,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
        wait_seconds: float = 0.0,
        accepted: frozenset[int] = frozenset(),
    ) -> httpx.Response:
        """The whole answer, of a status below 400 or one of `accepted`. Raises ProblemError,
        ServiceUnreachable, UnexpectedAnswer.
        """

        async def once() -> httpx.Response:
            response = await self._http.send(
                self._request(method, path, params, json, content, headers, key, wait_seconds)
            )
            if response.status_code >= 400 and response.status_code not in accepted:
                raise self._problem(response)
            return response

        return await self._retrying(once, idempotent=is_idempotent(method, key))

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        wait_seconds: float = 0.0,
    ) -> AsyncIterator[httpx.Response]:
        """A GET's answer with its body unread. Reading it raises httpx's own errors: only the
        reader knows where to go on.
        """

        async def once() -> httpx.Response:
            response = await self._http.send(
                self._request("GET", path, params, None, None, headers, None, wait_seconds),
                stream=True,
            )
            if response.status_code >= 400:
                try:
                    await response.aread()
                finally:
                    await response.aclose()
                raise self._problem(response)
            return response

        response = await self._retrying(once, idempotent=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def open_blocking(
        self,
        http: httpx.Client,
        path: str,
        *,
        params: Mapping[str, Any],
        headers: Mapping[str, str],
    ) -> httpx.Response:
        """As `stream`, of a client whose answers are read and closed in threads."""

        def opened_blocking() -> httpx.Response:
            request = http.build_request(
                "GET", path, params=_given(params), headers=headers, timeout=self._timeout(0.0)
            )
            response = http.send(request, stream=True)
            if response.status_code >= 400:
                try:
                    response.read()
                finally:
                    response.close()
                raise self._problem(response)
            return response

        return await self._retrying(lambda: asyncio.to_thread(opened_blocking), idempotent=True)

    async def back_off(self, *, attempt: int, at_least_seconds: float = 0.0) -> None:
        """Waits before attempt `attempt` + 1."""
        backoff = full_jitter(
            self._randomness,
            attempt=attempt,
            base_seconds=self.retry.backoff_base_seconds,
            cap_seconds=self.retry.backoff_cap_seconds,
        )
        await self._clock.sleep(max(backoff, at_least_seconds))

    def unreachable(self, error: httpx.TransportError) -> ServiceUnreachable:
        return ServiceUnreachable(url=str(self._http.base_url).rstrip("/"), reason=_reason(error))

    def _request(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        json: Mapping[str, Any] | None,
        content: Content | None,
        headers: Mapping[str, str] | None,
        key: str | None,
        wait_seconds: float,
    ) -> httpx.Request:
        sent = dict(headers or {})
        if key is not None:
            sent["Idempotency-Key"] = key
        return self._http.build_request(
            method,
            path,
            params=_given(params),
            json=json,
            content=content() if callable(content) else content,
            headers=sent,
            timeout=self._timeout(wait_seconds),
        )

    def _timeout(self, wait_seconds: float) -> httpx.Timeout:
        idle = self._timeouts.idle_seconds + wait_seconds
        return httpx.Timeout(idle, connect=self._timeouts.connect_seconds, pool=None)

    async def _retrying(
        self, once: Callable[[], Awaitable[httpx.Response]], *, idempotent: bool
    ) -> httpx.Response:
        attempt = 0
        while True:
            attempt += 1
            wait_seconds = 0.0
            try:
                return await once()
            except ProblemError as problem:
                wait_seconds = problem.retry_after_seconds or 0.0
                if problem.status not in _REFUSED_WHOLE or not self._again(attempt, wait_seconds):
                    raise
            except httpx.TransportError as error:
                if not idempotent or attempt >= self._attempts_max(error):
                    raise self.unreachable(error) from error
            except httpx.DecodingError as error:
                raise UnexpectedAnswer(
                    f"An answer is not in the coding it names: {error}"
                ) from error
            await self.back_off(attempt=attempt, at_least_seconds=wait_seconds)

    def _again(self, attempt: int, wait_seconds: float) -> bool:
        return attempt < self.retry.attempts_max and wait_seconds <= self.retry.wait_seconds_max

    def _attempts_max(self, error: httpx.TransportError) -> int:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return min(self.retry.attempts_max, self.retry.connect_attempts_max)
        return self.retry.attempts_max

    def _problem(self, response: httpx.Response) -> ProblemError:
        members: dict[str, Any] = {}
        if response.headers.get("Content-Type", "").startswith(PROBLEM_TYPE):
            members = decoded(response, dict[str, Any])
        fixed = {name: members.pop(name, None) for name in ("code", "title", "detail", "status")}
        members.pop("type", None)
        return ProblemError(
            code=str(fixed["code"] or "unexpected_answer"),
            status=response.status_code,
            title=str(fixed["title"] or response.reason_phrase),
            detail=str(fixed["detail"] or response.text[:SHOWN_TEXT_CHARS]),
            extras=members,
            retry_after_seconds=self._retry_after(response.headers.get("Retry-After")),
        )

    def _retry_after(self, header: str | None) -> float | None:
        """Seconds to wait: `Retry-After` holds them, or an HTTP date (RFC 9110, 10.2.3)."""
        if header is None:
            return None
        if header.isdecimal():
            return float(header)
        try:
            until = parsedate_to_datetime(header).timestamp()
        except ValueError:
            return None
        return max(0.0, until - self._clock.wall_ns() / 1e9)


def _given(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value is not None}


def path_of(*segments: str) -> str:
    """The path of these segments, each of them one segment whatever it holds. Raises ValueError for
    what no quoting makes one: on the way, `..` would become another path than was asked for.
    """
    for one in segments:
        if one in {"", ".", ".."}:
            raise ValueError(f"{one!r} names nothing in a path")
    return "".join(f"/{quote(one, safe='')}" for one in segments)


def is_idempotent(method: str, key: str | None) -> bool:
    return method in _IDEMPOTENT_METHODS or key is not None


def decoded(response: httpx.Response, answer: type[T]) -> T:
    """Raises UnexpectedAnswer."""
    try:
        return msgspec.json.decode(response.content, type=answer)
    except msgspec.MsgspecError as error:
        raise UnexpectedAnswer(
            f"{response.request.method} {response.request.url} gave {response.status_code} "
            f"and no such JSON as expected: {error}"
        ) from error


def _reason(error: httpx.TransportError) -> str:
    match error:
        case httpx.ConnectTimeout():
            return "connecting took too long"
        case httpx.TimeoutException():
            return "the answer took too long"
        case httpx.ConnectError():
            return _system_reason(error) or str(error) or "the connection was refused"
        case _:
            return str(error) or "the connection broke off"


def _system_reason(error: BaseException) -> str | None:
    """What the operating system said: httpx tells only that connecting failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            text = os.strerror(cause.errno) if cause.errno > 0 else cause.strerror or str(cause)
            return text[:1].lower() + text[1:]
        cause = cause.__cause__ or cause.__context__
    return None
