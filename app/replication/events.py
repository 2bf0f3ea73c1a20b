"""What a follower tells of: each kind is a line of NDJSON, and for people a sentence."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "following",  # the lock is held, and it is known where to go on
    "wal_sent",
    "image_sending",
    "image_sent",
    "caught_up",
    "sqlite_checkpoint",
    "let_go",
    "service_away",
    "service_back",
    "waiting",  # the file cannot be followed now
    "refused",  # and not later either
    "checkpointed",  # the service's own checkpoint
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    event: Kind
    database: str
    detail: str
    members: dict[str, int | str | None] = field(default_factory=dict)

    def document(self) -> dict[str, object]:
        return {
            "event": self.event,
            "database": self.database,
            "detail": self.detail,
            **self.members,
        }


@dataclass(slots=True, kw_only=True)
class Status:
    """How a follower stands, for who draws it."""

    last_lsn: int = 0
    log_bytes: int = 0
    unsent_bytes: int = 0
    sent_bytes: int = 0
    image_sent_bytes: int = 0
    image_total_bytes: int = 0
    images: int = 0
    sqlite_checkpoints: int = 0
    caught_up: bool = False
    away: bool = False
    refusal: str | None = None
    refusal_code: str | None = None


Tell = Callable[[Event], None]
