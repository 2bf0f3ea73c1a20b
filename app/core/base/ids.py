"""Identifiers. Plain integers and strings at run time, distinct types for the checker."""

import re
from typing import NewType

from app.core.base.clock import Clock, Randomness

JobId = NewType("JobId", str)
CheckpointId = NewType("CheckpointId", str)

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


def is_name(text: str) -> bool:
    """True for a tenant, database or snapshot name: safe in keys, paths and URLs."""
    return _NAME.fullmatch(text) is not None


def is_ulid(text: str) -> bool:
    return _ULID.fullmatch(text) is not None


def new_ulid(clock: Clock, randomness: Randomness) -> str:
    """A ULID (github.com/ulid/spec): 48 bits of milliseconds, 80 random bits, Crockford base 32.

    Order within a millisecond is random; nothing relies on it.
    """
    value = ((clock.wall_ns() // 1_000_000) << 80) | randomness.bits(80)
    return "".join(_CROCKFORD[(value >> shift) & 31] for shift in range(125, -5, -5))


def checkpoint_id(*, generation: int, epoch: int, job_id: JobId, replans: int = 0) -> CheckpointId:
    """Fixed when a job plans: two attempts of one plan agree; two jobs, or two plans of one job,
    never collide (I7, I17).
    """
    plan = f"-{replans}" if replans else ""
    return CheckpointId(f"{generation:010d}-{epoch:06d}-{job_id}{plan}")


def job_of(checkpoint_id: str) -> str:
    """The job that an intact checkpoint id is of."""
    return checkpoint_id.split("-")[2]
