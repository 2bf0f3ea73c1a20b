"""`restore`: a database of the service as a SQLite file."""

import asyncio
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.databases import DatabaseArgument
from app.cli.failures import Failure, wrong_usage
from app.cli.session import parse_name, parse_plain_name, session_of
from app.cli.units import bytes_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.replication.restore import Restored


def restore(
    context: typer.Context,
    name: DatabaseArgument,
    output: Annotated[Path, typer.Option("-o", "--to", help="The file to make.")],
    generation: Annotated[int | None, typer.Option(min=1)] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="By its name.", callback=parse_plain_name)
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="TIMESTAMP", help="RFC 3339; the newest generation by then."),
    ] = None,
    check: Annotated[
        bool, typer.Option(help="PRAGMA integrity_check instead of quick_check.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option(help="Replace an existing database, its -wal, -shm and -journal too."),
    ] = False,
) -> None:
    """Restore a database to a file; by default its newest committed state."""
    session = session_of(context)
    tenant, database = parse_name(name)
    if sum(each is not None for each in (generation, snapshot, at)) > 1:
        raise wrong_usage("Choose one of --generation, --snapshot and --at.")
    moment = None if at is None else parse_moment(at)
    from app.client.images import Wanted  # noqa: PLC0415 - not on the way to --help
    from app.replication.restore import (  # noqa: PLC0415 - not on the way to --help
        DatabaseInUse,
        RestoreFailed,
        TargetExists,
        existing,
    )
    from app.replication.restore import restore as run  # noqa: PLC0415 - as above

    async def work(client: "BopClient") -> "Restored":
        task = asyncio.current_task()
        assert task is not None, "it runs in one"
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with session.screen.meter() as meter:
            return await run(
                client,
                Wanted(
                    tenant=tenant,
                    database=database,
                    generation=generation,
                    snapshot=snapshot,
                    at=moment,
                ),
                output,
                check="full" if check else "quick",
                replace=force,
                progress=lambda done, total: meter(name, done, total),
            )

    try:
        if existing(output) and not force:
            raise TargetExists(existing(output)[0])
        restored = session.run(work)
    except TargetExists as error:
        raise Failure(
            f"{error.path} exists.",
            hint="Choose another name, or --force: it removes the database there with its -wal, "
            "-shm and -journal. Nothing may have it open.",
            code="file_exists",
        ) from error
    except DatabaseInUse as error:
        raise Failure(
            f"{error.path} is in use by process {error.pid or 'of another container'}.",
            hint="Stop the application and 'replicate' first: they would go on writing to the file "
            "that is replaced.",
            code="database_in_use",
        ) from error
    except RestoreFailed as error:
        raise Failure(str(error), hint=_hint(error.code, name), code=error.code) from error
    except OSError as error:
        raise Failure(
            f"{output} cannot be written: {error.strerror or error}.", code="file_error"
        ) from error
    except asyncio.CancelledError as error:
        raise Failure(
            "It was stopped.",
            hint="The file has its name once it is whole, and not before.",
            code="interrupted",
        ) from error
    if session.screen.as_json:
        session.screen.document(restored)
        return
    session.screen.text(
        f"Restored {name} to {output}: {restored.page_count} pages "
        f"({bytes_text(restored.bytes)}), LSN {restored.lsn}, generation {restored.generation}."
    )


def _hint(code: str, name: str) -> str:
    if code == "empty_database":
        return f"Send it something first: 'bop-checkpoint replicate SQLITE_FILE {name} --once'."
    return (
        f"Nothing was changed. See 'bop-checkpoint generations {name}', and take an earlier one "
        "with --generation."
    )


def parse_moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise wrong_usage(f"--at: {text!r} is not like 2026-01-31T12:00:00Z.") from error
    if moment.tzinfo is None:
        raise wrong_usage(f"--at: {text!r} has no zone; write Z for UTC.")
    return moment.astimezone(UTC)
