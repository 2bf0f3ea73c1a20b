"""`replicate`: follow live SQLite databases."""

import asyncio
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.failures import FAILED, Failure, wrong_usage
from app.cli.screen import Meter, Screen
from app.cli.session import Session, session_of
from app.cli.units import bytes_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.replication.events import Event
    from app.replication.fleet import Fleet
    from app.replication.targets import Rule

SHOW_SECONDS = 0.2
MIB = 1024 * 1024


def replicate(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(metavar="SQLITE_FILE", help="Or a directory of them.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="TENANT/DATABASE", help="For a directory: TENANT, or TENANT/{stem}."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML list of files, directories and databases.")
    ] = None,
    once: Annotated[bool, typer.Option(help="Send everything up to now, and end.")] = False,
    checkpoint: Annotated[
        bool, typer.Option(help="At the end make a checkpoint, and wait for it.")
    ] = False,
    set_wal: Annotated[
        bool, typer.Option(help="Switch databases in rollback mode to WAL mode.")
    ] = False,
    wal_limit_mib: Annotated[
        int,
        typer.Option(min=1, help="While the service is away, a WAL beyond this is let go."),
    ] = 64,
) -> None:
    """Follow live SQLite databases: every commit goes to the service, until Ctrl-C.

    While a database is followed, its WAL is kept until it is sent, and emptied from here.
    """
    session = session_of(context)
    from app.client import RetryPolicy  # noqa: PLC0415 - not on the way to --help
    from app.replication.plan import Limits  # noqa: PLC0415 - as above

    rules = _rules(file, name, config)

    async def work(client: "BopClient") -> "Fleet":
        from app.replication.fleet import Fleet  # noqa: PLC0415 - as above

        def tell(event: "Event") -> None:
            _tell(session, event)

        fleet = Fleet(
            rules,
            client,
            tell=tell,
            limits=Limits(log_bytes=wal_limit_mib * MIB),
            set_wal=set_wal,
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, fleet.stop)
        try:
            with session.screen.meter() as meter:
                await _shown(fleet, meter, once=once)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        if checkpoint:
            await _checkpoint(session, client, fleet)
        return fleet

    # a follower decides itself when to ask again: meanwhile it looks after the WAL
    fleet = session.run(work, retry=RetryPolicy(attempts_max=1))
    _conclude(fleet, once=once)


def _rules(file: Path | None, name: str | None, config: Path | None) -> "list[Rule]":
    from app.replication.targets import (  # noqa: PLC0415 - not on the way to --help
        BadTargets,
        load_rules_blocking,
        rule_for,
    )

    try:
        if config is not None:
            if file is not None:
                raise wrong_usage("Give SQLITE_FILE TENANT/DATABASE or --config, not both.")
            return load_rules_blocking(config)
        if file is None or name is None:
            raise wrong_usage("Give SQLITE_FILE TENANT/DATABASE, or --config FILE.")
        return [rule_for(file, name)]
    except BadTargets as error:
        raise wrong_usage(f"{error}.") from error


async def _shown(fleet: "Fleet", meter: Meter, *, once: bool) -> None:
    async def show() -> None:
        while True:
            try:
                async with asyncio.timeout(SHOW_SECONDS):
                    await ended.wait()
            except TimeoutError:
                _show(fleet, meter)
            else:
                return

    ended = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        if sys.stderr.isatty():
            group.create_task(show())
        try:
            await fleet.run(once=once)
        finally:
            ended.set()


def _show(fleet: "Fleet", meter: Meter) -> None:
    statuses = fleet.statuses
    for name, status in statuses.items():
        if status.image_total_bytes:
            meter(f"{name} image", status.image_sent_bytes, status.image_total_bytes)
            return
    behind = sum(status.unsent_bytes for status in statuses.values())
    sent = sum(status.sent_bytes for status in statuses.values())
    what = next(iter(statuses)) if len(statuses) == 1 else f"{len(statuses)} databases"
    state = "the service is away" if any(each.away for each in statuses.values()) else "following"
    lag = f"{bytes_text(behind)} behind" if behind else "up to date"
    meter(f"{what}: {state}, {lag}, {bytes_text(sent)} sent", 0, None)


def _tell(session: Session, event: "Event") -> None:
    screen: Screen = session.screen
    if screen.as_json:
        at = datetime.fromtimestamp(session.clock.wall_ns() / 1e9, tz=UTC)
        screen.document({"at": f"{at:%Y-%m-%dT%H:%M:%S.%f}Z", **event.document()})
    elif event.event not in {"wal_sent", "sqlite_checkpoint", "following"}:
        screen.note(f"{event.database}: {event.detail}")


async def _checkpoint(session: Session, client: "BopClient", fleet: "Fleet") -> None:
    from app.replication.events import Event  # noqa: PLC0415 - not on the way to --help

    jobs = [
        await client.checkpoints.trigger(target.tenant, target.database, reason="replicate")
        for target in fleet.targets
        if fleet.statuses[target.name].refusal is None
    ]
    for job in jobs:
        ended = await client.jobs.wait(job.id)
        name = f"{ended.tenant}/{ended.database}"
        if ended.state != "completed":
            detail = (ended.error or {}).get("detail") or f"it was {ended.state}"
            raise Failure(
                f"The checkpoint of {name} did not complete: {detail}.",
                code=str((ended.error or {}).get("code", ended.state)),
            )
        result = ended.result or {}
        event = Event(
            event="checkpointed",
            database=name,
            detail=f"Checkpointed as generation {result.get('generation', '-')}.",
            members={
                "job_id": ended.id,
                "generation": result.get("generation"),
                "last_lsn": result.get("last_lsn"),
            },
        )
        _tell(session, event)


def _conclude(fleet: "Fleet", *, once: bool) -> None:
    """1 where a database was refused."""
    statuses = fleet.statuses
    refused = {name: each for name, each in statuses.items() if each.refusal is not None}
    if len(statuses) == 1 and refused:
        (status,) = refused.values()
        raise Failure(str(status.refusal), code=str(status.refusal_code))
    if refused:
        raise typer.Exit(FAILED)
    if once and not statuses:
        raise Failure("There is nothing to follow.", code="nothing_found")
