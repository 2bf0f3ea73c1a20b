"""What must hold inside a batch's transaction, before it writes anything (I6): values.

They are judged in `preconditions.py`.
"""

import msgspec


class Precondition(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class ExpectGeneration(Precondition, frozen=True, kw_only=True, tag=True):
    db_id: int
    generation: int


class ExpectLeases(Precondition, frozen=True, kw_only=True, tag=True):
    """The job holds exactly these, alive by this process's monotonic clock: (chunk_id, token)."""

    db_id: int
    job_id: str
    tokens: tuple[tuple[int, int], ...]


class ExpectNoLeases(Precondition, frozen=True, kw_only=True, tag=True):
    """No live lease on a chunk of the database. Else refused (`LeaseConflict`)."""

    db_id: int


class ExpectRun(Precondition, frozen=True, kw_only=True, tag=True):
    """The job is in flight, in this run, and (unless allowed) nobody asked to cancel it."""

    job_id: str
    run: int
    allow_cancelled: bool = False


class ExpectJobState(Precondition, frozen=True, kw_only=True, tag=True):
    job_id: str
    states: tuple[str, ...]


class ExpectNotDoomed(Precondition, frozen=True, kw_only=True, tag=True):
    keys: tuple[str, ...]


class ExpectEpoch(Precondition, frozen=True, kw_only=True, tag=True):
    """The process's claim of the remote prefix is still the one the plan was made under."""

    epoch: int


class ExpectSegmentState(Precondition, frozen=True, kw_only=True, tag=True):
    db_id: int
    segment_id: int
    state: str


class ExpectNoIdempotency(Precondition, frozen=True, kw_only=True, tag=True):
    scope_hash: bytes
