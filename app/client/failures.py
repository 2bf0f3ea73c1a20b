"""What can go wrong between a caller and the service."""

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """Base of everything that the client raises for reasons outside the caller's code."""


class ProblemError(ClientError):
    """The service answered with a problem (RFC 9457). `code` is the stable part."""

    def __init__(
        self,
        *,
        code: str,
        status: int,
        title: str,
        detail: str,
        extras: Mapping[str, Any],
        retry_after_seconds: float | None = None,
    ) -> None:
        self.code = code
        self.status = status
        self.title = title
        self.detail = detail
        self.extras = extras
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"{status} {code}: {detail or title}")


class ServiceUnreachable(ClientError):
    """No answer came. What was asked may have taken effect all the same, unless the connection
    was never made.
    """

    def __init__(self, *, url: str, reason: str) -> None:
        self.url = url
        self.reason = reason
        super().__init__(f"{url} does not answer: {reason}")


class UnexpectedAnswer(ClientError):
    """The answer is not one of this service: perhaps a proxy's, or of another version."""


class StreamBroken(ClientError):
    """A stream ended before it was whole, again and again at the same place."""
