"""`cold-scan`: a generation, read past the service's caches, as a file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.databases import DatabaseArgument
from app.cli.failures import Failure, wrong_usage
from app.cli.session import parse_name, parse_plain_name, session_of
from app.cli.units import bytes_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.scan_file import Scanned
    from app.core.formats.cold_scan import ScanStart

Bound = Annotated[int | None, typer.Option(min=1, help="Inclusive; with --frames or records.")]


def cold_scan(
    context: typer.Context,
    name: DatabaseArgument,
    output: Annotated[Path, typer.Option("-o", "--to", help="The file to make.")],
    generation: Annotated[int | None, typer.Option(min=1)] = None,
    snapshot: Annotated[
        str | None, typer.Option(help="By its name.", callback=parse_plain_name)
    ] = None,
    frames: Annotated[
        bool, typer.Option("--frames", help="Keep the stream as it comes, checked.")
    ] = False,
    first_page: Bound = None,
    last_page: Bound = None,
    from_lsn: Bound = None,
    to_lsn: Bound = None,
    max_bytes_per_second: Annotated[int | None, typer.Option(min=1)] = None,
    priority: Annotated[
        Literal["low", "normal"], typer.Option(help="Among the tenant's scans.")
    ] = "normal",
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Scan a generation into a file: a SQLite database, or records (u32 length and bytes)."""
    session = session_of(context)
    tenant, database = parse_name(name)
    if generation is not None and snapshot is not None:
        raise wrong_usage("Choose one of --generation and --snapshot.")
    if (first_page is not None or last_page is not None) and not frames:
        raise wrong_usage("Some pages make no database: with a range of pages, say --frames.")
    from app.client.cold_scans import ScanRequest  # noqa: PLC0415 - not on the way to --help
    from app.client.scan_file import scan_to_file  # noqa: PLC0415 - as above

    asked = ScanRequest(
        tenant=tenant, database=database, generation=generation, snapshot=snapshot,
        first_page=first_page, last_page=last_page, from_lsn=from_lsn, to_lsn=to_lsn,
        max_bytes_per_second=max_bytes_per_second, priority=priority,
    )  # fmt: skip

    async def work(client: "BopClient") -> "Scanned":
        with session.screen.meter() as meter:

            def progress(start: "ScanStart", done: int, chunks: int) -> None:
                meter(f"{name} {bytes_text(done)}", chunks, start.chunks or None)

            return await scan_to_file(
                client.cold_scans, asked, output,
                form="frames" if frames else "content", replace=force, progress=progress,
            )  # fmt: skip

    try:
        scanned = session.run(work)
    except FileExistsError as error:
        raise Failure(
            f"{output} exists.", hint="Choose another name, or --force.", code="file_exists"
        ) from error
    except OSError as error:
        raise Failure(
            f"{output} cannot be written: {error.strerror or error}.", code="file_error"
        ) from error
    if session.screen.as_json:
        session.screen.document(scanned)
        return
    session.screen.text(
        f"Scanned {name}, generation {scanned.generation}, to {output}: {scanned.chunks} chunks, "
        f"{bytes_text(scanned.bytes)}."
    )
