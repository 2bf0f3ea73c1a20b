"""`snapshots`, `fork`, `generations` and `databases update`: what is kept, and under which name."""

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.databases import DatabaseArgument, LimitOption, show_database
from app.cli.failures import wrong_usage
from app.cli.screen import Column
from app.cli.session import parse_name, parse_plain_name, session_of
from app.cli.units import bytes_text, count_text, lsns_text, time_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.wire import Generation, Snapshot

snapshots = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Pin generations under a name."
)

SnapshotArgument = Annotated[str, typer.Argument(metavar="NAME", callback=parse_plain_name)]
GenerationOption = Annotated[
    int | None, typer.Option(min=1, help="By default the newest published one.")
]


@snapshots.command("create")
def create_snapshot(
    context: typer.Context,
    name: DatabaseArgument,
    snapshot: SnapshotArgument,
    generation: GenerationOption = None,
) -> None:
    """Keep a generation readable until the snapshot is deleted."""
    session = session_of(context)
    tenant, database = parse_name(name)
    made = session.run(
        lambda client: client.history.create_snapshot(
            tenant, database, snapshot, generation=generation
        )
    )
    if session.screen.as_json:
        session.screen.document(made)
        return
    session.screen.text(f"{made.name} pins generation {made.generation}, LSN {made.last_lsn}.")


@snapshots.command("list")
def list_snapshots(
    context: typer.Context, name: DatabaseArgument, limit: LimitOption = None
) -> None:
    """List a database's snapshots."""
    session = session_of(context)
    tenant, database = parse_name(name)

    async def work(client: "BopClient") -> "list[Snapshot]":
        return [one async for one in client.history.snapshots(tenant, database, limit=limit)]

    found = session.run(work)
    if session.screen.as_json:
        session.screen.document({"items": found})
        return
    session.screen.table(
        [
            Column(name="SNAPSHOT"),
            Column(name="GENERATION", right=True),
            Column(name="LAST LSN", right=True),
            Column(name="PAGES", right=True),
            Column(name="CREATED"),
        ],
        [
            [
                one.name,
                str(one.generation),
                str(one.last_lsn),
                count_text(one.page_count),
                time_text(one.created_at),
            ]
            for one in found
        ],
        empty=f"{name} has no snapshot.",
    )


@snapshots.command("delete")
def delete_snapshot(
    context: typer.Context, name: DatabaseArgument, snapshot: SnapshotArgument
) -> None:
    """Take the pin away: its generation goes when no rule keeps it."""
    session = session_of(context)
    tenant, database = parse_name(name)
    session.run(lambda client: client.history.delete_snapshot(tenant, database, snapshot))
    if session.screen.as_json:
        session.screen.document({"database": name, "deleted": snapshot})
    session.screen.note(f"Deleted snapshot {snapshot} of {name}.")


def fork(
    context: typer.Context,
    name: DatabaseArgument,
    new: Annotated[
        str, typer.Argument(metavar="NEW", help="The new database's name, or TENANT/DATABASE.")
    ],
    tenant: Annotated[
        str | None,
        typer.Option(help="Of the new one; else the same.", callback=parse_plain_name),
    ] = None,
    generation: GenerationOption = None,
    snapshot: Annotated[
        str | None, typer.Option(help="By its name.", callback=parse_plain_name)
    ] = None,
) -> None:
    """Make a new database from a generation, without copying it; both go on by themselves."""
    session = session_of(context)
    if generation is not None and snapshot is not None:
        raise wrong_usage("Choose one of --generation and --snapshot.")
    parent_tenant, parent = parse_name(name)
    new_tenant, new_database = _place_of_fork(new, tenant)
    made = session.run(
        lambda client: client.history.fork(
            parent_tenant, parent, new_database,
            new_tenant=new_tenant, generation=generation, snapshot=snapshot,
        )
    )  # fmt: skip
    session.screen.note(f"Forked {name} to {made.tenant}/{made.database}.")
    show_database(session.screen, made)


def update(
    context: typer.Context,
    name: DatabaseArgument,
    keep_generations: Annotated[
        str | None, typer.Option(metavar="N|none", help="Keep the newest N generations.")
    ] = None,
    keep_seconds: Annotated[
        str | None,
        typer.Option(metavar="S|none", help="Keep what was the newest within S seconds."),
    ] = None,
    minimum_generations: Annotated[
        int | None, typer.Option(min=1, help="Never keep fewer than this.")
    ] = None,
) -> None:
    """Change how long a database's generations are kept."""
    session = session_of(context)
    tenant, database = parse_name(name)
    rules: dict[str, int | None] = {}
    if keep_generations is not None:
        rules["keep_generations"] = _number("--keep-generations", keep_generations)
    if keep_seconds is not None:
        rules["keep_seconds"] = _number("--keep-seconds", keep_seconds)
    if minimum_generations is not None:
        rules["minimum_generations"] = minimum_generations
    if not rules:
        raise wrong_usage("Name at least one rule; --help lists them.")
    changed = session.run(lambda client: client.history.set_retention(tenant, database, rules))
    show_database(session.screen, changed)


def list_generations(
    context: typer.Context,
    name: DatabaseArgument,
    limit: LimitOption = None,
    expiring: Annotated[
        bool, typer.Option("--expiring", help="Only those that nothing keeps any longer.")
    ] = False,
) -> None:
    """List a database's generations, oldest first."""
    session = session_of(context)
    tenant, database = parse_name(name)

    async def work(client: "BopClient") -> "list[Generation]":
        source = client.history.expiring if expiring else client.databases.generations
        return [one async for one in source(tenant, database, limit=limit)]

    found = session.run(work)
    if session.screen.as_json:
        session.screen.document({"items": found})
        return
    make_one = f"make one with 'bop-checkpoint checkpoint {name}'"
    session.screen.table(
        [
            Column(name="GENERATION", right=True),
            Column(name="CREATED"),
            Column(name="LSNS"),
            Column(name="CHUNKS", right=True),
            Column(name="DELTAS", right=True),
            Column(name="UPLOADED", right=True),
            Column(name="SUPERSEDED"),
        ],
        [
            [
                str(one.generation),
                time_text(one.created_at),
                lsns_text(one.first_lsn, one.last_lsn),
                count_text(one.base_chunks),
                count_text(one.delta_chunks),
                bytes_text(one.bytes_uploaded),
                time_text(one.superseded_at),
            ]
            for one in found
        ],
        empty=f"{name}: every generation is kept."
        if expiring
        else f"{name} has no generation yet; {make_one}.",
    )


def _place_of_fork(new: str, tenant: str | None) -> tuple[str | None, str]:
    if "/" not in new:
        parse_plain_name(new)
        return tenant, new
    named, database = parse_name(new)
    if tenant not in {None, named}:
        raise wrong_usage(f"{new} is not of the tenant {tenant}.")
    return named, database


def _number(option: str, text: str) -> int | None:
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit()):
        raise wrong_usage(f"{option}: {text!r} is neither a number nor 'none'.")
    return int(text)
