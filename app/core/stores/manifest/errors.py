"""Why the manifest turned a batch or a read away.

A refusal takes only its own batch; nothing of that batch was written.
"""

from app.core.base.errors import Conflict, FormatFromFuture, InternalError, ManifestBusy


class BatchRefused(Conflict):
    """The batch does not fit the manifest as it is now: nothing of it was written."""

    code = "batch_refused"
    title = "The manifest has moved on"


class NameTaken(BatchRefused):
    code = "database_conflict"
    title = "The name is in use"


class RowExists(BatchRefused):
    title = "The row exists already"


class MissingRow(BatchRefused):
    title = "The row is not there"


class SnapshotTaken(BatchRefused):
    code = "snapshot_exists"
    title = "The snapshot's name is in use"


class GenerationGone(BatchRefused):
    code = "generation_expired"
    title = "The generation is not retained"


class RowPinned(BatchRefused):
    """Fields: `names`."""

    code = "snapshot_pinned"
    title = "A snapshot or fork needs the row"


class WrongState(BatchRefused):
    title = "The row is in another state"


class GenerationMoved(BatchRefused):
    code = "lease_lost"
    title = "Another generation was published meanwhile"


class LeaseConflict(BatchRefused):
    """Fields: `holder` (a job id), `db_id`, `chunk_id`, `expires_at_us`."""

    code = "lease_held"
    title = "Another job holds the chunk"


class LeaseLost(BatchRefused):
    code = "lease_lost"
    title = "A lease has expired or was taken away"


class KeyDoomed(BatchRefused):
    code = "lease_lost"
    title = "A named blob is being deleted"
    hint = "Plan anew, under a new checkpoint_id."


class RunSuperseded(BatchRefused):
    code = "lease_lost"
    title = "The job is no longer in this run"


class CancelRequested(RunSuperseded):
    code = "cancelled"
    title = "The job is to be cancelled"


class EpochSuperseded(BatchRefused):
    code = "lease_lost"
    title = "The process claimed the remote prefix anew meanwhile"


class IdempotencyExists(BatchRefused):
    title = "An answer to this Idempotency-Key is stored already"


class ViewExpired(ManifestBusy):
    """The view was open beyond the age limit and was ended, so that it cannot fill the map."""

    title = "The read took too long and was ended"


class CorruptRow(InternalError):
    """Bytes that no version of this record wrote. Fields: `table`, `key` (hexadecimal)."""

    title = "A manifest row cannot be decoded"
    hint = "Restore the newest backup of the manifest, or run `bop-checkpoint recover`."


class FormatTooOld(InternalError):
    title = "Written by a version that is too old to be read"
    hint = "Start the versions in between first, one after the other."


UNREADABLE = (CorruptRow, FormatTooOld, FormatFromFuture)
"""What a row is met with that cannot be decoded; each is told as `manifest.row_unreadable`."""
