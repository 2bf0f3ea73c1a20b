"""What a job's row says of how it ended."""

from app.core.base.errors import BopError
from app.core.stores.manifest.records import JobFailure, JobRecord

CANCELLED = "The job was cancelled on request."


def ended_reason(job: JobRecord, state: str) -> str:
    """Heads the change record, if the end of the job leaves one."""
    if state == "cancelled" and job.cancelled_by is not None:
        return "checkpoint.cancelled_by_truncation"
    return f"job.{state}"


def failure_of(error: BopError) -> JobFailure:
    plain = {name: value for name, value in error.fields.items() if _is_plain(value)}
    return JobFailure(
        kind=error.kind.value, code=error.code, title=error.title, detail=error.advice, fields=plain
    )


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return isinstance(value, str | int | float | bool | None)
