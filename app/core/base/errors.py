"""Domain errors: what went wrong, its stable code, its fields, and what to do next.

`core` raises these and knows nothing of HTTP; `routers/problems.py` maps kinds to statuses.
A new class exists only where a caller would act differently.
"""

from enum import Enum
from typing import ClassVar


class ErrorKind(Enum):
    MALFORMED = "malformed"  # the body is not what it says it is
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_ACCEPTABLE = "not_acceptable"
    CONFLICT = "conflict"
    GONE = "gone"
    PRECONDITION = "precondition"
    TOO_LARGE = "too_large"
    UNSUPPORTED = "unsupported"
    RANGE = "range"
    INVALID = "invalid"  # well-formed, but not allowed
    BACKPRESSURE = "backpressure"
    CORRUPT = "corrupt"
    INTERNAL = "internal"
    UNAVAILABLE = "unavailable"
    EXHAUSTED = "exhausted"


class BopError(Exception):
    """Base of every expected failure. `fields` become the problem's extra members."""

    kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    hint: ClassVar[str] = ""

    def __init__(
        self, detail: str = "", *, retry_after_seconds: int | None = None, **fields: object
    ) -> None:
        self.detail = detail or self.title
        self.retry_after_seconds = retry_after_seconds
        self.fields = fields
        super().__init__(self.detail)

    def __str__(self) -> str:
        shown = " ".join(f"{name}={value!r}" for name, value in self.fields.items())
        return f"{self.code}: {self.detail}" + (f" ({shown})" if shown else "")

    @property
    def advice(self) -> str:
        """The detail, and what to do next where that is known."""
        told = self.detail if self.detail.endswith((".", "!", "?")) else f"{self.detail}."
        return f"{told} {self.hint}" if self.hint else told


# --- malformed bodies -------------------------------------------------------------------------


class MalformedRecords(BopError):
    kind, code = ErrorKind.MALFORMED, "malformed_records"
    title = "The body does not hold whole records"
    hint = "Nothing was stored; send the body again, whole and framed as its Content-Type says."


class WalInvalid(BopError):
    kind, code = ErrorKind.MALFORMED, "wal_invalid"
    title = "The body is not a whole write-ahead log"
    hint = "Nothing of it was kept. Read the log again; if that is damaged, send an image."


class ImageInvalid(BopError):
    kind, code = ErrorKind.MALFORMED, "image_invalid"
    title = "The body is not a SQLite database file"
    hint = "Nothing was stored; send a whole file, taken while nothing writes to it."


# --- access -----------------------------------------------------------------------------------


class Unauthenticated(BopError):
    kind, code = ErrorKind.UNAUTHENTICATED, "unauthenticated"
    title = "A valid token is needed"
    hint = "Send 'Authorization: Bearer <token>'."


class Forbidden(BopError):
    kind, code = ErrorKind.FORBIDDEN, "forbidden"
    title = "The token's scopes do not allow this"


class SelfApproval(Forbidden):
    code = "self_approval"
    title = "Whoever asked cannot approve"
    hint = "Let another principal approve it; see BOP_ADMIN_APPROVALS."


# --- not found --------------------------------------------------------------------------------


class NotFound(BopError):
    kind, code = ErrorKind.NOT_FOUND, "not_found"
    title = "No such thing"


class DatabaseNotFound(NotFound):
    code = "database_not_found"
    title = "No such database"
    hint = "Create it with PUT /tenants/{tenant}/databases/{database}."


class PageNotFound(NotFound):
    code = "page_not_found"
    title = "The database has no such page"


class SnapshotNotFound(NotFound):
    code = "snapshot_not_found"
    title = "No such snapshot"


class JobNotFound(NotFound):
    code = "job_not_found"
    title = "No such job"


class CursorNotFound(NotFound):
    code = "cursor_not_found"
    title = "No such cursor"
    hint = "Make it with PUT /change-cursors/{name}."


class LeaseNotFound(NotFound):
    code = "lease_not_found"
    title = "Nobody holds that lease"
    hint = "See GET /debug/checkpoint/leases."


class ApprovalNotFound(NotFound):
    code = "approval_not_found"
    title = "No such approval waits for a decision"
    hint = "See GET /admin/approvals."


# --- conflicts --------------------------------------------------------------------------------


class Conflict(BopError):
    kind = ErrorKind.CONFLICT


class DatabaseConflict(Conflict):
    code = "database_conflict"
    title = "The database exists with other properties"


class WrongEngine(Conflict):
    code = "wrong_engine"
    title = "The database's engine does not take this"


class FeatureDisabled(Conflict):
    code = "feature_disabled"
    title = "Switched off for this tenant"
    hint = "See GET /admin/tenants/{tenant}/feature-flags."


class WalLost(Conflict):
    code = "wal_lost"
    title = "Unpublished WAL of this database was lost"
    hint = "Accept the loss with POST …/acknowledge-loss; LSNs go on above all ever given out."


class WalGap(Conflict):
    code = "wal_gap"
    title = "The log does not continue what is stored"
    hint = "Go on where the fields say, or send an image with PUT …/image."


class PageSizeMismatch(Conflict):
    code = "page_size_mismatch"
    title = "The database has pages of another size"
    hint = "Make another database with this page size."


class SnapshotPinned(Conflict):
    """Fields: `names`, of snapshots, and of forks as `tenant/database`."""

    code = "snapshot_pinned"
    title = "Snapshots or forks still need it"
    hint = "Delete them first."


class JobAlreadyEnded(Conflict):
    code = "job_already_ended"
    title = "The job has ended"


class QueueDrained(Conflict):
    code = "queue_drained"
    title = "The job queue is drained"
    hint = "Resume it with POST /admin/queue/resume."


class SnapshotExists(Conflict):
    code = "snapshot_exists"
    title = "A snapshot of this name exists"
    hint = "Choose another name, or delete the snapshot first."


class NoGeneration(Conflict):
    code = "no_generation"
    title = "Nothing is published yet"
    hint = "Trigger a checkpoint with POST /checkpoints."


# --- gone, preconditions ----------------------------------------------------------------------


class LsnTruncated(BopError):
    kind, code = ErrorKind.GONE, "lsn_truncated"
    title = "The LSN lies before the oldest readable one"
    hint = "Read from first_lsn on."


class GenerationExpired(BopError):
    kind, code = ErrorKind.GONE, "generation_expired"
    title = "The generation is no longer retained"
    hint = "See GET …/generations for those that are."


class CursorExpired(BopError):
    kind, code = ErrorKind.GONE, "cursor_expired"
    title = "The change log was trimmed beyond the cursor"
    hint = "Read the state itself, then set the cursor anew with PUT /change-cursors/{name}."


class LsnMismatch(BopError):
    kind, code = ErrorKind.PRECONDITION, "lsn_mismatch"
    title = "next_lsn is not what If-Match says"
    hint = "Read what was appended since, then try again with the new next_lsn."


class PreconditionFailed(BopError):
    kind, code = ErrorKind.PRECONDITION, "precondition_failed"
    title = "The precondition does not hold"


# --- sizes and types --------------------------------------------------------------------------


class RecordTooLarge(BopError):
    kind, code = ErrorKind.TOO_LARGE, "record_too_large"
    title = "A record is larger than allowed"


class BodyTooLarge(BopError):
    kind, code = ErrorKind.TOO_LARGE, "body_too_large"
    title = "The body is larger than allowed"
    hint = "Split it into several requests."


class TransactionTooLarge(BopError):
    kind, code = ErrorKind.TOO_LARGE, "transaction_too_large"
    title = "A transaction is larger than the WAL budget"
    hint = "Raise BOP_WAL_BUDGET_BYTES."


class UnsupportedMediaType(BopError):
    kind, code = ErrorKind.UNSUPPORTED, "unsupported_media_type"
    title = "The Content-Type is not taken here"


class NotAcceptable(BopError):
    kind, code = ErrorKind.NOT_ACCEPTABLE, "not_acceptable"
    title = "No offered media type is acceptable"


class NotLineRecords(NotAcceptable):
    code = "not_line_records"
    title = "A record holds a newline and cannot be sent as NDJSON"
    hint = "Ask for application/vnd.bop.records."


class RangeNotSatisfiable(BopError):
    kind, code = ErrorKind.RANGE, "range_not_satisfiable"
    title = "The range lies beyond the end"


class InvalidRequest(BopError):
    kind, code = ErrorKind.INVALID, "invalid_request"
    title = "The request is not valid"


class LsnOutOfRange(InvalidRequest):
    code = "lsn_out_of_range"
    title = "The LSN lies outside what can be named"


class IdempotencyKeyReused(InvalidRequest):
    code = "idempotency_key_reused"
    title = "The Idempotency-Key was used with another body"


# --- back-pressure and room -------------------------------------------------------------------


class Backpressure(BopError):
    kind, code = ErrorKind.BACKPRESSURE, "backpressure"
    title = "Too much is waiting"
    hint = "Try again after Retry-After."


class QuotaExhausted(BopError):
    kind, code = ErrorKind.EXHAUSTED, "quota_exhausted"
    title = "The storage quota is used up"
    hint = "Wait for checkpoints to free room, or raise the quota."


class DiskFull(BopError):
    kind, code = ErrorKind.EXHAUSTED, "disk_full"
    title = "The data disk is full"
    hint = "Free room on the data volume; nothing of the request was kept."


class ManifestFull(BopError):
    kind, code = ErrorKind.EXHAUSTED, "manifest_full"
    title = "The manifest's map is full"
    hint = "Raise BOP_MANIFEST_MAP_BYTES and restart."


# --- damage -----------------------------------------------------------------------------------


class Corrupt(BopError):
    kind = ErrorKind.CORRUPT


class CorruptBlob(Corrupt):
    code = "corrupt_blob"
    title = "A blob does not match its recorded checksum"
    hint = "See docs/runbooks; nothing of it was served."


class CorruptWal(Corrupt):
    code = "corrupt_wal"
    title = "Acknowledged WAL is damaged"
    hint = "Nothing was cut; see docs/operations.md on damaged WAL."


class InternalError(BopError):
    """An expected kind of internal failure, told without inner details."""


class InvariantViolation(InternalError):
    """A bug. The job or batch fails and publishes nothing."""

    title = "An invariant would have been broken"


class FormatFromFuture(InternalError):
    """A record or file was written by a newer version; refuse rather than guess."""

    title = "Written by a newer version"
    hint = "Start the newer version, or restore a backup made by this one."


# --- unavailable ------------------------------------------------------------------------------


class Unavailable(BopError):
    kind = ErrorKind.UNAVAILABLE


class NotReady(Unavailable):
    code = "not_ready"
    title = "Not ready"
    hint = "Watch GET /readyz."


class RemoteUnavailable(Unavailable):
    code = "remote_unavailable"
    title = "The remote store does not answer as it should"
    hint = "The WAL goes on buffering; the work is tried again by itself."


class ManifestBusy(Unavailable):
    code = "manifest_busy"
    title = "The manifest takes no more readers or writes just now"


class OutcomeUnknown(RemoteUnavailable):
    """The call may or may not have taken effect: re-read before retrying or compensating (I15)."""

    title = "The outcome of a remote call is unknown"


# --- errors of jobs ---------------------------------------------------------------------------


class StalePlan(BopError):
    """The plan's preconditions no longer hold (generation moved, key doomed, lease gone)."""

    kind, code = ErrorKind.CONFLICT, "lease_lost"
    title = "The plan is stale"
    hint = "The job plans anew by itself."


class JobCancelled(BopError):
    kind, code = ErrorKind.CONFLICT, "cancelled"
    title = "Cancelled"


class LeaseTimeout(BopError):
    """Fields: `holder`, the job in the way."""

    kind, code = ErrorKind.CONFLICT, "lease_timeout"
    title = "A lease was not given up in time"
    hint = "Ask again when the holder has ended, with more time, or with on_lease=cancel."


class DeadlineExceeded(BopError):
    kind, code = ErrorKind.UNAVAILABLE, "deadline_exceeded"
    title = "The job ran out of time"


# --- ends the process in order ----------------------------------------------------------------


class FatalError(Exception):
    """Fail-stop (I16, I17): acknowledgements end at once and the process ends in order."""


class StorageFailure(FatalError):
    """An EIO, a failed fsync or an LMDB panic: what is on the disk is unknown until re-read."""


class OwnershipLost(FatalError):
    """Another process holds a higher epoch on the remote prefix."""


class StartRefused(Exception):
    """The process must not start on this state; the text says what to do."""
