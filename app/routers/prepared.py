"""A response whose headers are bytes already: Starlette's own composing of them is a good part of
what a small answer costs.
"""

from collections.abc import Sequence

from starlette.responses import Response


class PreparedResponse(Response):
    """`headers` are all of them, names in lower case, the length included."""

    def __init__(
        self, body: bytes, headers: Sequence[tuple[bytes, bytes]], *, status_code: int = 200
    ) -> None:
        self.status_code = status_code
        self.background = None
        self.body = body
        self.raw_headers = list(headers)
