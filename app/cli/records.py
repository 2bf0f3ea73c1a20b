"""`append` and `records`: data in, data out."""

import base64
import sys
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from app.cli.databases import DatabaseArgument
from app.cli.failures import Failure, wrong_usage
from app.cli.record_input import RecordFormat, iter_batches
from app.cli.session import parse_name, session_of
from app.cli.units import bytes_text, count_text, lsns_text
from app.core.base.errors import BopError
from app.core.formats.record_framing import pack_records

if TYPE_CHECKING:
    from app.client import BopClient, RecordBatch
    from app.client.wire import Appended


def append(
    context: typer.Context,
    name: DatabaseArgument,
    file: Annotated[
        str, typer.Argument(metavar="FILE|-", help="'-': standard input.", show_default=False)
    ] = "-",
    record_format: Annotated[
        RecordFormat,
        typer.Option(
            "--format",
            help="ndjson: a line is a record. records: each record is a u32 little-endian length "
            "and its bytes. single: the whole input is one record.",
        ),
    ] = "ndjson",
) -> None:
    """Append records. What is reported is durable.

    Up to 8 MiB of records are stored all or none; longer input is appended in several parts.
    """
    session = session_of(context)
    tenant, database = parse_name(name)
    parts: list[Appended] = []

    async def work(client: "BopClient") -> None:
        with session.screen.meter() as meter:
            async with aclosing(iter_batches(source, record_format)) as batches:
                async for batch in batches:
                    appended = await client.records.append(
                        tenant, database, batch.body, media_type=batch.media_type
                    )
                    _merge(parts, appended)
                    meter(f"{parts[0].count:,} records appended", 0, None)

    with opened(file) as source:
        try:
            session.run(work)
        except BopError as error:
            raise _partly(Failure(error.detail, code=error.code), parts) from error
        except Failure as failure:
            raise _partly(failure, parts) from failure
    total = parts[0]
    if session.screen.as_json:
        session.screen.document(total)
        return
    lsns = lsns_text(total.first_lsn, total.last_lsn)
    session.screen.text(
        f"Appended {count_text(total.count)} record{'s' if total.count != 1 else ''} "
        f"({bytes_text(total.bytes)}) to {name} as LSN {lsns}."
    )


def read(
    context: typer.Context,
    name: DatabaseArgument,
    from_lsn: Annotated[
        int | None, typer.Option("--from", min=1, help="Default: the oldest readable LSN.")
    ] = None,
    to_lsn: Annotated[
        int | None, typer.Option("--to", min=1, help="Inclusive. Default: the newest LSN.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="This many records at most.")] = None,
    record_format: Annotated[
        RecordFormat,
        typer.Option("--format", help="As 'append' takes them; single: one record, as it is."),
    ] = "ndjson",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with records as they are appended.")
    ] = False,
) -> None:
    """Read records, in LSN order, as they were appended.

    With --output json: a line for each, {"lsn", "record"}, or {"lsn", "base64"} where a record is
    not UTF-8.
    """
    session = session_of(context)
    tenant, database = parse_name(name)
    if record_format == "single":
        if follow or limit not in {None, 1}:
            raise wrong_usage("--format single shows one record; choose it with --from.")
        limit = 1

    async def work(client: "BopClient") -> int:
        count = 0
        async with aclosing(
            client.records.iter_batches(
                tenant, database, from_lsn=from_lsn, to_lsn=to_lsn, limit=limit, follow=follow
            )
        ) as batches:
            async for batch in batches:
                count += len(batch.records)
                if session.screen.as_json:
                    session.screen.documents(described(batch))
                else:
                    session.screen.raw(encoded(batch, record_format))
        return count

    count = session.run(work)
    if count == 0 and record_format == "single":
        raise Failure(f"{name} holds no such record.", code="no_record")


def encoded(batch: "RecordBatch", record_format: RecordFormat) -> bytes:
    """Raises Failure for a record that the format cannot hold."""
    match record_format:
        case "records":
            return pack_records(batch.records)
        case "single":
            return batch.records[0]
        case "ndjson":
            lines = b"\n".join([*batch.records, b""])
            if lines.count(b"\n") != len(batch.records):
                raise _not_a_line(batch)
            return lines


def described(batch: "RecordBatch") -> Iterator[dict[str, object]]:
    for offset, data in enumerate(batch.records):
        lsn = batch.first_lsn + offset
        try:
            yield {"lsn": lsn, "record": data.decode()}
        except UnicodeDecodeError:
            yield {"lsn": lsn, "base64": base64.b64encode(data).decode()}


@contextmanager
def opened(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        yield sys.stdin.buffer
        return
    try:
        source = Path(file).open("rb")  # noqa: SIM115 - the with below closes it
    except OSError as error:
        raise Failure(f"{file} cannot be read: {error.strerror}.", code="file_error") from error
    with source:
        yield source


def _merge(parts: "list[Appended]", appended: "Appended") -> None:
    """Keeps one total: a long pipe must not fill the memory with its parts."""
    if not parts:
        parts.append(appended)
        return
    total = parts[0]
    parts[0] = type(total)(
        first_lsn=total.first_lsn,
        last_lsn=appended.last_lsn,
        count=total.count + appended.count,
        bytes=total.bytes + appended.bytes,
    )


def _partly(failure: Failure, parts: "list[Appended]") -> Failure:
    """Says what was stored before it failed."""
    if not parts:
        return failure
    total = parts[0]
    return Failure(
        f"{failure.detail} {count_text(total.count)} records had been appended before, up to LSN "
        f"{total.last_lsn}.",
        hint=failure.hint,
        code=failure.code,
        members={**failure.members, "appended": {"count": total.count, "last_lsn": total.last_lsn}},
    )


def _not_a_line(batch: "RecordBatch") -> Failure:
    lsn = next(
        batch.first_lsn + offset for offset, data in enumerate(batch.records) if b"\n" in data
    )
    return Failure(
        f"The record at LSN {lsn} holds a newline, so it is not a line.",
        hint="Use --format records, or --output json.",
        code="not_line_records",
    )
