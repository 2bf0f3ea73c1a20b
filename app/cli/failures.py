"""Expected failures: a clear sentence, what to do, an exit code; never a traceback."""

from collections.abc import Mapping
from typing import Any

from app.core.base.errors import (
    DatabaseNotFound,
    Forbidden,
    JobNotFound,
    NotReady,
    Unauthenticated,
    WalLost,
)

FAILED = 1
WRONG_USAGE = 2

HINTS: Mapping[str, str] = {
    "unauthenticated": "Pass --token, or set BOP_TOKEN.",
    "forbidden": "Use a token whose scopes and tenants allow this.",
    "database_not_found": "Create it with 'bop-checkpoint databases create TENANT/DATABASE', "
    "or see 'bop-checkpoint databases list TENANT'.",
    "job_not_found": "See 'bop-checkpoint jobs list'.",
    "wal_lost": "Accept the loss with 'bop-checkpoint databases acknowledge-loss TENANT/DATABASE'.",
    "not_ready": "Wait until /readyz answers 200; its reasons say what is missing.",
}

API_HINTS: Mapping[str, str] = {
    error.code: error.hint
    for error in (Unauthenticated, Forbidden, DatabaseNotFound, JobNotFound, WalLost, NotReady)
}
"""What the service says in their place, of its paths and headers."""


class Failure(Exception):
    """Ends the command: `detail` says what happened, `hint` what to do."""

    def __init__(
        self,
        detail: str,
        *,
        hint: str = "",
        code: str = "failed",
        exit_code: int = FAILED,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        self.detail = detail
        self.hint = hint
        self.code = code
        self.exit_code = exit_code
        self.members = members or {}
        super().__init__(detail)

    def document(self) -> dict[str, Any]:
        shown: dict[str, Any] = {**self.members, "code": self.code, "detail": self.detail}
        if self.hint:
            shown["hint"] = self.hint
        return shown


def wrong_usage(detail: str, *, hint: str = "") -> Failure:
    return Failure(detail, hint=hint, code="wrong_usage", exit_code=WRONG_USAGE)
