"""`databases`."""

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.cli.screen import Column, Screen
from app.cli.session import parse_name, parse_tenant, session_of
from app.cli.units import bytes_text, count_text, lsns_text, seconds_text, time_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.wire import Database, Retention

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Create databases and look at them."
)

Engine = Literal["append_only", "libsql"]
Codec = Literal["none", "zstd", "lz4"]
DatabaseArgument = Annotated[str, typer.Argument(metavar="TENANT/DATABASE")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Show this many at most.")]


@app.command()
def create(
    context: typer.Context,
    name: DatabaseArgument,
    engine: Annotated[Engine, typer.Option(help="What it holds: records, or SQLite pages.")] = (
        "append_only"
    ),
    page_size: Annotated[int | None, typer.Option(help="libsql only; in bytes.")] = None,
    chunk_bytes: Annotated[int | None, typer.Option(help="Default 64 MiB.")] = None,
    compression: Annotated[
        Codec | None, typer.Option(help="Default: zstd for libsql, none for append_only.")
    ] = None,
) -> None:
    """Create a database. The same again changes nothing."""
    session = session_of(context)
    tenant, database = parse_name(name)

    async def work(client: "BopClient") -> "tuple[Database, bool]":
        return await client.databases.create(
            tenant,
            database,
            engine=engine,
            page_size=page_size,
            chunk_bytes=chunk_bytes,
            compression=compression,
        )

    made, is_new = session.run(work)
    session.screen.note(f"{'Created' if is_new else 'Exists already:'} {tenant}/{database}.")
    show_database(session.screen, made)


@app.command("list")
def list_databases(
    context: typer.Context,
    tenant: Annotated[str, typer.Argument(metavar="TENANT")],
    limit: LimitOption = None,
) -> None:
    """List a tenant's databases."""
    session = session_of(context)
    parse_tenant(tenant)

    async def work(client: "BopClient") -> "list[Database]":
        return [one async for one in client.databases.list(tenant, limit=limit)]

    found = session.run(work)
    if session.screen.as_json:
        session.screen.document({"items": found})
        return
    session.screen.table(
        [
            Column(name="DATABASE"),
            Column(name="ENGINE"),
            Column(name="LSNS"),
            Column(name="CHECKPOINTED", right=True),
            Column(name="GENERATION", right=True),
            Column(name="WAL", right=True),
            Column(name="HEALTH"),
        ],
        [
            [
                f"{one.tenant}/{one.database}",
                one.engine,
                lsns_text(one.first_lsn, one.next_lsn - 1),
                str(one.checkpointed_lsn),
                str(one.generation),
                bytes_text(one.wal_bytes),
                one.health.state,
            ]
            for one in found
        ],
        empty=f"{tenant} has no database.",
    )


@app.command()
def show(context: typer.Context, name: DatabaseArgument) -> None:
    """Show one database."""
    session = session_of(context)
    tenant, database = parse_name(name)
    found = session.run(lambda client: client.databases.get(tenant, database))
    show_database(session.screen, found)


@app.command("acknowledge-loss")
def acknowledge_loss(context: typer.Context, name: DatabaseArgument) -> None:
    """Accept that unpublished WAL was lost, so that the database takes writes again."""
    session = session_of(context)
    tenant, database = parse_name(name)
    found = session.run(lambda client: client.databases.acknowledge_loss(tenant, database))
    show_database(session.screen, found)


def show_database(screen: Screen, found: "Database") -> None:
    if screen.as_json:
        screen.document(found)
        return
    facts = {
        "Database": f"{found.tenant}/{found.database}",
        "Engine": found.engine,
        "State": found.state,
        "Health": found.health.state,
        "LSNs": lsns_text(found.first_lsn, found.next_lsn - 1),
        "Checkpointed LSN": str(found.checkpointed_lsn),
        "Generation": str(found.generation),
        "WAL": bytes_text(found.wal_bytes),
        "Chunk size": bytes_text(found.chunk_bytes),
        "Compression": found.compression,
        "Created": time_text(found.created_at),
    }
    if found.health.lost_from_lsn is not None:
        facts["Lost from LSN"] = str(found.health.lost_from_lsn)
    if found.page_size is not None:
        facts["Pages"] = f"{count_text(found.page_count)} of {bytes_text(found.page_size)}"
    if found.earliest_generation is not None:
        span = f"{found.earliest_generation} to {found.latest_generation}"
        facts["Restorable"] = f"generations {span}"
    if found.retention is not None:
        facts["Retention"] = _retention_text(found.retention)
    if found.forked_from is not None:
        parent = found.forked_from
        facts["Forked from"] = f"{parent.tenant}/{parent.database}@{parent.generation}"
    screen.facts(facts)


def _retention_text(rules: "Retention") -> str:
    kept = [f"at least {rules.minimum_generations}"]
    if rules.keep_generations is not None:
        kept.append(f"the newest {rules.keep_generations}")
    if rules.keep_seconds is not None:
        kept.append(f"the last {seconds_text(rules.keep_seconds)}")
    return ", ".join(kept)
