"""`checkpoint` and `jobs`."""

import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.databases import DatabaseArgument, LimitOption
from app.cli.failures import FAILED
from app.cli.screen import Column, Screen
from app.cli.session import parse_id, parse_name, parse_plain_name, session_of
from app.cli.units import bytes_text, lsns_text, seconds_text, time_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.wire import Job

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at jobs, wait for them, cancel them."
)


Kind = Literal[
    "create_checkpoint",
    "truncate_append_only",
    "verify_manifest",
    "download_checkpoint",
    "prune_checkpoint",
    "coalesce_chunks",
]


class State(StrEnum):
    """As typer takes it more than once; it takes no list of a Literal."""

    pending = "pending"
    in_flight = "in_flight"
    completed = "completed"
    failed = "failed"
    cancelled = "cancelled"


JobArgument = Annotated[str, typer.Argument(metavar="JOB", callback=parse_id)]


def checkpoint(
    context: typer.Context,
    name: DatabaseArgument,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until it has ended; 1 unless completed.")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="Kept with the job.")] = None,
) -> None:
    """Checkpoint a database: publish all that it holds now to the remote store."""
    session = session_of(context)
    tenant, database = parse_name(name)

    async def work(client: "BopClient") -> "Job":
        job = await client.checkpoints.trigger(tenant, database, reason=reason)
        if wait:
            job = await followed(session.screen, client.checkpoints.watch(job.id))
        return job

    job = session.run(work)
    show_job(session.screen, job)
    if not wait:
        session.screen.note(f"Follow it with 'bop-checkpoint jobs watch {job.id}'.")
    elif job.state != "completed":
        raise typer.Exit(FAILED)


@app.command("list")
def list_jobs(
    context: typer.Context,
    tenant: Annotated[
        str | None, typer.Option(help="Only this tenant's.", callback=parse_plain_name)
    ] = None,
    database: Annotated[
        str | None,
        typer.Option(help="Only those of databases so named.", callback=parse_plain_name),
    ] = None,
    state: Annotated[
        list[State] | None, typer.Option(help="Only those in this state; may be repeated.")
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Only of this kind.")] = None,
    limit: LimitOption = 100,
) -> None:
    """List jobs, newest first."""
    session = session_of(context)

    async def work(client: "BopClient") -> "list[Job]":
        found = client.jobs.list(
            tenant=tenant,
            database=database,
            state=[one.value for one in state or ()],
            kind=kind,
            limit=limit,
        )
        return [one async for one in found]

    found = session.run(work)
    if session.screen.as_json:
        session.screen.document({"items": found})
        return
    session.screen.table(
        [
            Column(name="JOB"),
            Column(name="KIND"),
            Column(name="DATABASE"),
            Column(name="STATE"),
            Column(name="CREATED"),
            Column(name="TOOK", right=True),
            Column(name="UPLOADED", right=True),
        ],
        [
            [
                one.id,
                one.kind,
                f"{one.tenant}/{one.database}",
                one.state if one.stage is None else f"{one.state} ({one.stage})",
                time_text(one.created_at),
                took_text(one),
                bytes_text(one.progress.uploaded_bytes),
            ]
            for one in found
        ],
        empty="There are no such jobs.",
    )


@app.command()
def show(context: typer.Context, job_id: JobArgument) -> None:
    """Show one job."""
    session = session_of(context)
    show_job(session.screen, session.run(lambda client: client.jobs.get(job_id)))


@app.command()
def watch(context: typer.Context, job_id: JobArgument) -> None:
    """Follow a job until it has ended; 1 unless it completed. As JSON: a line for each change."""
    session = session_of(context)

    async def work(client: "BopClient") -> "Job":
        first = await client.jobs.get(job_id)
        is_checkpoint = first.kind == "create_checkpoint"
        jobs = client.checkpoints if is_checkpoint else client.jobs
        return await followed(session.screen, jobs.watch(job_id), tell_each=True)

    job = session.run(work)
    if not session.screen.as_json:
        show_job(session.screen, job)
    if job.state != "completed":
        raise typer.Exit(FAILED)


@app.command()
def cancel(context: typer.Context, job_id: JobArgument) -> None:
    """Ask a job to end; it does so at its next step."""
    session = session_of(context)
    show_job(session.screen, session.run(lambda client: client.jobs.cancel(job_id)))


async def followed(
    screen: Screen, changes: "AsyncGenerator[Job, None]", *, tell_each: bool = False
) -> "Job":
    """The job once it has ended, its progress shown meanwhile: a bar on a terminal, and, if
    `tell_each`, a line for each change where there is none.
    """
    job: Job | None = None
    lines = tell_each and (screen.as_json or not sys.stderr.isatty())
    with screen.meter() as meter:
        async with aclosing(changes):
            async for job in changes:
                progress = job.progress
                meter(
                    f"{job.tenant}/{job.database} {step_text(job)}",
                    progress.uploaded_bytes,
                    progress.total_bytes or None,
                )
                if lines and screen.as_json:
                    screen.document(job)
                elif lines:
                    screen.note(f"{step_text(job)} {progress_text(job)}")
    assert job is not None, "a watched job is seen at least once"
    return job


def show_job(screen: Screen, job: "Job") -> None:
    if screen.as_json:
        screen.document(job)
        return
    facts = {
        "Job": job.id,
        "Kind": job.kind,
        "Database": f"{job.tenant}/{job.database}",
        "State": step_text(job),
        "Progress": progress_text(job),
        "Attempts": str(job.attempts),
        "Created": time_text(job.created_at),
        "Took": took_text(job),
    }
    if job.reason:
        facts["Reason"] = job.reason
    if job.result is not None:
        facts |= result_facts(job.result)
    if job.error is not None:
        facts["Error"] = f"{job.error.get('detail', '')} ({job.error.get('code', '')})"
    screen.facts(facts)


def result_facts(result: dict[str, object]) -> dict[str, str]:
    """The results of all kinds of jobs, by the members they have."""
    facts: dict[str, str] = {}
    match result:
        case {"outcome": str(outcome)}:
            facts["Outcome"] = outcome
    match result:
        case {"generation": int(generation)}:
            facts["Generation"] = str(generation)
    match result:
        case {"first_lsn": int(first), "last_lsn": int(last)}:
            facts["LSNs"] = lsns_text(first, last)
    match result:
        case {"first_lsn": int(first), "dropped": dropped}:
            facts["First LSN"] = str(first)
            match dropped:
                case {"first_lsn": int(first), "last_lsn": int(last)}:
                    facts["Dropped"] = lsns_text(first, last)
    match result:
        case {"bytes_uploaded": int(count)}:
            facts["Uploaded"] = bytes_text(count)
    match result:
        case {"findings": list(findings)} if findings:
            facts["Findings"] = "\n".join(f"{one['outcome']} {one['key']}" for one in findings)
    return facts


def step_text(job: "Job") -> str:
    return job.state if job.stage is None else f"{job.state}, {job.stage}"


def progress_text(job: "Job") -> str:
    progress = job.progress
    reads = job.kind in {"verify_manifest", "download_checkpoint"}
    done = progress.staged_chunks if reads else progress.uploaded_blobs
    return (
        f"{done}/{progress.total_chunks} chunks, "
        f"{bytes_text(progress.uploaded_bytes)}/{bytes_text(progress.total_bytes)}"
    )


def took_text(job: "Job") -> str:
    if job.started_at is None or job.finished_at is None:
        return "-"
    return seconds_text((job.finished_at - job.started_at).total_seconds())
