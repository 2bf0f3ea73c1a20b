"""`gc` and `databases delete`."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.databases import DatabaseArgument
from app.cli.failures import FAILED
from app.cli.jobs import followed, show_job
from app.cli.session import parse_name, session_of
from app.cli.units import bytes_text, count_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.wire import Job


def gc(
    context: typer.Context,
    orphans: Annotated[
        Literal["report", "delete"] | None,
        typer.Option(help="Also list the remote store for objects that nobody knows."),
    ] = None,
    accept_clock: Annotated[
        bool, typer.Option("--accept-clock", help="Go on although the wall clock jumped.")
    ] = False,
) -> None:
    """Apply retention now and collect what is due; 1 if some of it could not be deleted."""
    session = session_of(context)
    report = session.run(
        lambda client: client.collection.run(orphans=orphans, accept_clock=accept_clock)
    )
    if session.screen.as_json:
        session.screen.document(report)
    else:
        facts = {
            "expired generations": count_text(report.expired_generations),
            "retired": f"{count_text(report.retired_blobs)}, {bytes_text(report.retired_bytes)}",
            "deleted": f"{count_text(report.deleted_blobs)}, {bytes_text(report.deleted_bytes)}",
            "not deleted": count_text(report.failed_blobs),
            "waiting": count_text(report.waiting_blobs),
        }
        if report.orphans is not None:
            found = report.orphans
            facts["orphans"] = f"{count_text(found['count'])}, {bytes_text(found['bytes'])}"
        session.screen.facts(facts)
        if report.paused:
            session.screen.note(
                "Collection is paused: the wall clock jumped. Look at it, then run with "
                "--accept-clock."
            )
    if report.failed_blobs or report.paused:
        raise typer.Exit(FAILED)


def delete_database(
    context: typer.Context,
    name: DatabaseArgument,
    snapshots: Annotated[
        bool, typer.Option("--snapshots", help="Its snapshots go with it.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until it has ended; 1 unless completed.")
    ] = False,
) -> None:
    """Delete a database: its name is free at once, its blobs go when nothing needs them."""
    session = session_of(context)
    tenant, database = parse_name(name)

    async def work(client: "BopClient") -> "Job":
        job = await client.collection.delete_database(tenant, database, with_snapshots=snapshots)
        if wait:
            job = await followed(session.screen, client.jobs.watch(job.id))
        return job

    job = session.run(work)
    show_job(session.screen, job)
    if wait and job.state != "completed":
        raise typer.Exit(FAILED)
