"""`verify` and `download`: jobs about a published generation."""

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.databases import DatabaseArgument
from app.cli.failures import FAILED
from app.cli.jobs import followed, show_job
from app.cli.session import parse_name, session_of

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.wire import Job

GenerationOption = Annotated[
    int | None, typer.Option(min=1, help="By default the newest published one.")
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Wait until it has ended; 1 unless completed.")
]


def verify(
    context: typer.Context,
    name: DatabaseArgument,
    generation: GenerationOption = None,
    wait: WaitOption = False,
) -> None:
    """Verify a generation: read all bytes of its blobs again, and mend what can be mended."""
    _run(context, name, generation, wait, what="verify")


def download(
    context: typer.Context,
    name: DatabaseArgument,
    generation: GenerationOption = None,
    wait: WaitOption = False,
) -> None:
    """Download a generation into the service's hot cache."""
    _run(context, name, generation, wait, what="download")


def _run(
    context: typer.Context, name: str, generation: int | None, wait: bool, *, what: str
) -> None:
    session = session_of(context)
    tenant, database = parse_name(name)

    async def work(client: "BopClient") -> "Job":
        jobs = client.generation_jobs
        ask = jobs.verify if what == "verify" else jobs.download
        job = await ask(tenant, database, generation=generation)
        return await followed(session.screen, client.jobs.watch(job.id)) if wait else job

    job = session.run(work)
    show_job(session.screen, job)
    if not wait:
        session.screen.note(f"Follow it with 'bop-checkpoint jobs watch {job.id}'.")
    elif job.state != "completed":
        raise typer.Exit(FAILED)
