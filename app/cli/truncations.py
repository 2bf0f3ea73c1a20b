"""`truncate`."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.databases import DatabaseArgument
from app.cli.failures import FAILED, wrong_usage
from app.cli.jobs import followed, show_job
from app.cli.session import parse_name, session_of

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.wire import Job


def truncate(
    context: typer.Context,
    name: DatabaseArgument,
    head: Annotated[
        int | None,
        typer.Option(min=1, metavar="LSN", help="Drop published chunks that end below it."),
    ] = None,
    tail: Annotated[
        int | None,
        typer.Option(min=1, metavar="LSN", help="Drop it and every record after it."),
    ] = None,
    on_lease: Annotated[
        Literal["wait", "cancel"],
        typer.Option("--on-lease", help="What becomes of a checkpoint in the way."),
    ] = "wait",
    timeout: Annotated[
        float, typer.Option(min=0, max=3600, metavar="SECONDS", help="How long to wait for it.")
    ] = 30.0,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until it has ended; 1 unless completed.")
    ] = False,
) -> None:
    """Truncate an append-only database: drop its oldest chunks, or its newest records."""
    session = session_of(context)
    tenant, database = parse_name(name)
    if (head is None) == (tail is None):
        raise wrong_usage("Say either --head LSN or --tail LSN.")
    lsn = head if head is not None else tail
    assert lsn is not None

    async def work(client: "BopClient") -> "Job":
        job = await client.truncations.request(
            tenant,
            database,
            direction="tail" if head is None else "head",
            lsn=lsn,
            on_lease=on_lease,
            lease_timeout_seconds=timeout,
        )
        if wait:
            job = await followed(session.screen, client.truncations.watch(job.id))
        return job

    job = session.run(work)
    show_job(session.screen, job)
    if not wait:
        session.screen.note(f"Follow it with 'bop-checkpoint jobs watch {job.id}'.")
    elif job.state != "completed":
        raise typer.Exit(FAILED)
