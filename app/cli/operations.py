"""`leases`, `manifest` and `fsck`: what an on-call engineer looks at."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.databases import LimitOption
from app.cli.failures import FAILED, Failure
from app.cli.screen import Column, Screen
from app.cli.service import loaded_settings, started_failures
from app.cli.session import session_of
from app.cli.units import bytes_text, time_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.wire import Change, Lease

leases = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Chunk leases.")
manifest = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The manifest: its sizes and its change log."
)


@leases.command("list")
def list_leases(context: typer.Context, limit: LimitOption = None) -> None:
    """List the leases that jobs hold on chunks."""
    session = session_of(context)

    async def work(client: "BopClient") -> "list[Lease]":
        return [one async for one in client.operations.leases(limit=limit)]

    found = session.run(work)
    if session.screen.as_json:
        session.screen.document({"items": found})
        return
    session.screen.table(
        [
            Column(name="DATABASE"),
            Column(name="CHUNK", right=True),
            Column(name="GENERATION", right=True),
            Column(name="JOB"),
            Column(name="TOKEN", right=True),
            Column(name="REGISTERED"),
            Column(name="EXPIRES"),
        ],
        [
            [
                f"{one.tenant}/{one.database}",
                str(one.chunk_id),
                str(one.generation),
                one.job_id,
                str(one.token),
                time_text(one.registered_at),
                time_text(one.expires_at),
            ]
            for one in found
        ],
        empty="No chunk is leased.",
    )


@manifest.command()
def stats(context: typer.Context) -> None:
    """Show sizes, rows per table and readers."""
    session = session_of(context)
    found = session.run(lambda client: client.operations.manifest_stats())
    if session.screen.as_json:
        session.screen.document(found)
        return
    session.screen.facts(dict(flat_facts(found)))


@manifest.command("change-log")
def change_log(
    context: typer.Context,
    after: Annotated[int, typer.Option(min=0, help="The last sequence already seen.")] = 0,
    limit: LimitOption = 1000,
) -> None:
    """Show committed changes, oldest first. As JSON: a line for each."""
    session = session_of(context)
    rows: list[list[str]] = []

    async def work(client: "BopClient") -> None:
        changes = client.operations.change_log(after=after, limit=limit)
        async with aclosing(changes):
            async for one in changes:
                if session.screen.as_json:
                    session.screen.document(one)
                else:
                    rows.append(change_row(one))

    session.run(work)
    if session.screen.as_json:
        return
    session.screen.table(
        [
            Column(name="SEQUENCE", right=True),
            Column(name="COMMITTED"),
            Column(name="DATABASE"),
            Column(name="GENERATION", right=True),
            Column(name="REASON"),
            Column(name="OPS", right=True),
        ],
        rows,
        empty="There are no such changes.",
    )


def change_row(change: "Change") -> list[str]:
    return [
        str(change.sequence),
        time_text(change.committed_at),
        f"{change.tenant}/{change.database}",
        str(change.generation),
        change.reason,
        str(len(change.ops)),
    ]


def fsck(
    context: typer.Context,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="A stopped service's data directory; without it, a running service."),
    ] = None,
) -> None:
    """Check that manifest, remote store and local files agree; 1 if they do not."""
    session = session_of(context)
    if data_dir is None:
        report = session.run(lambda client: client.operations.fsck())
        findings = [(one.invariant, one.where, one.detail) for one in report.findings]
        checked = report.checked
    else:
        findings, checked = fsck_directory(data_dir)
    show_findings(session.screen, findings, checked)
    if findings:
        raise typer.Exit(FAILED)


def fsck_directory(data_dir: Path) -> tuple[list[tuple[str, str, str]], dict[str, int]]:
    if not (data_dir / "manifest").is_dir():
        raise Failure(
            f"{data_dir} holds no manifest, so it is not a service's data directory.",
            hint="Name the directory that BOP_DATA_DIR named when the service ran.",
            code="no_manifest",
        )
    settings = loaded_settings(data_dir=data_dir)
    with started_failures():
        from app.container import fsck as check  # noqa: PLC0415 - opens LMDB and S3

        report = asyncio.run(check(settings))
    return [(one.invariant, one.where, one.detail) for one in report.findings], report.checked


def show_findings(
    screen: Screen, findings: list[tuple[str, str, str]], checked: dict[str, int]
) -> None:
    if screen.as_json:
        screen.document(
            {
                "findings": [
                    {"invariant": invariant, "where": where, "detail": detail}
                    for invariant, where, detail in findings
                ],
                "checked": checked,
            }
        )
        return
    screen.table(
        [Column(name="INVARIANT"), Column(name="WHERE"), Column(name="DETAIL")],
        findings,
        empty="Everything agrees.",
    )
    said = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in checked.items())
    screen.note(f"Checked {said or 'nothing: there is nothing yet'}.")


def flat_facts(members: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested members as 'outer.inner', sizes with their unit."""
    facts: list[tuple[str, str]] = []
    for name, value in members.items():
        if isinstance(value, dict):
            facts += flat_facts(value, f"{prefix}{name}.")
        elif isinstance(value, int) and not isinstance(value, bool) and name.endswith("bytes"):
            facts.append((f"{prefix}{name}", bytes_text(value)))
        else:
            facts.append((f"{prefix}{name}", f"{value:,}" if type(value) is int else str(value)))
    return facts
