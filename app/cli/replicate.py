"""`replicate`: follow live SQLite databases."""

import asyncio
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.failures import API_HINTS, FAILED, HINTS, Failure, wrong_usage
from app.cli.screen import Meter, Screen
from app.cli.session import Session, session_of
from app.cli.units import bytes_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.wire import Job
    from app.replication.events import Event
    from app.replication.fleet import Fleet
    from app.replication.follower import Follower
    from app.replication.targets import Rule

SHOW_SECONDS = 0.2
MIB = 1024 * 1024


_HINTS = {
    "unreachable": "See --url or BOP_URL, and what /readyz says there. The next run goes on where "
    "this one stopped.",
    "file_error": "It needs to read and write the file and its directory, as the application's "
    "user can. The next run goes on where this one stopped.",
    "database_conflict": "Follow it to a database of another name.",
    "page_size_mismatch": "Follow it to a database of another name.",
    "unexpected_answer": "See --url or BOP_URL; perhaps a proxy is in between.",
}


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

    teller = _Teller(session)

    async def work(client: "BopClient") -> "Fleet":
        from app.replication.fleet import Fleet  # noqa: PLC0415 - as above

        fleet = Fleet(
            rules,
            client,
            tell=teller,
            limits=Limits(log_bytes=wal_limit_mib * MIB),
            set_wal=set_wal,
        )
        teller.nobody_reads = fleet.stop
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, fleet.stop)
        try:
            with session.screen.meter() as meter:
                await _shown(fleet, meter, once=once)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        return fleet

    # a follower decides itself when to ask again: meanwhile it looks after the WAL
    fleet = session.run(work, retry=RetryPolicy(attempts_max=1))
    if teller.is_broken:
        raise typer.Exit(FAILED)
    followers = [each for each in fleet.followers if each.status.refusal is None]
    if once and not all(each.is_done for each in followers):
        raise Failure(
            "It was stopped before all was sent.",
            hint="The next run goes on where this one stopped.",
            code="interrupted",
        )
    if checkpoint:
        session.run(lambda client: _checkpoint(client, followers, teller))
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
    refused = sum(status.refusal is not None for status in statuses.values())
    if refused:
        lag += f", {refused} refused"
    meter(f"{what}: {state}, {lag}, {bytes_text(sent)} sent", 0, None)


class _Teller:
    """Tells events as they come. What cannot be told stops nothing: the disk that is full may be
    that of the log file. Who closes its end of a pipe, ends the command.
    """

    def __init__(self, session: Session) -> None:
        self.nobody_reads: Callable[[], None] = lambda: None
        self.is_broken = False
        self._session = session

    def __call__(self, event: "Event") -> None:
        screen: Screen = self._session.screen
        try:
            if screen.as_json:
                at = datetime.fromtimestamp(self._session.clock.wall_ns() / 1e9, tz=UTC)
                screen.document({"at": f"{at:%Y-%m-%dT%H:%M:%S.%f}Z", **event.document()})
            elif event.event not in {"wal_sent", "sqlite_checkpoint", "following"}:
                screen.note(f"{event.database}: {event.detail}")
        except BrokenPipeError:
            self.is_broken = True
            self.nobody_reads()
        except OSError:
            pass


async def _checkpoint(
    client: "BopClient", followers: "list[Follower]", tell: "Callable[[Event], None]"
) -> None:
    """All of them, though one fails. Raises Failure, ClientError."""
    from app.client import ClientError  # noqa: PLC0415 - not on the way to --help

    failures: list[Failure | ClientError] = []
    jobs: list[Job] = []
    for target in (each.target for each in followers):
        try:
            jobs.append(
                await client.checkpoints.trigger(target.tenant, target.database, reason="replicate")
            )
        except ClientError as error:
            failures.append(error)
    for job in jobs:
        try:
            _tell_checkpoint(await client.jobs.wait(job.id), tell)
        except (ClientError, Failure) as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _tell_checkpoint(ended: "Job", tell: "Callable[[Event], None]") -> None:
    from app.replication.events import Event  # noqa: PLC0415 - not on the way to --help

    name = f"{ended.tenant}/{ended.database}"
    if ended.state != "completed":
        detail = (ended.error or {}).get("detail") or f"it was {ended.state}"
        raise Failure(
            f"The checkpoint of {name} did not complete: {detail.rstrip('.')}.",
            hint=f"What was sent is kept; see 'bop-checkpoint jobs explain {ended.id}'.",
            code=str((ended.error or {}).get("code", ended.state)),
        )
    result = ended.result or {}
    tell(
        Event(
            event="checkpointed",
            database=name,
            detail=f"Checkpointed as generation {result.get('generation', '-')}.",
            members={
                "job_id": ended.id,
                "generation": result.get("generation"),
                "last_lsn": result.get("last_lsn"),
            },
        )
    )


def _conclude(fleet: "Fleet", *, once: bool) -> None:
    """1 where a database was refused, or one of a directory could not be told."""
    refused = [each for each in fleet.followers if each.status.refusal is not None]
    if len(fleet.followers) == 1 and refused and not fleet.unnamed:
        raise _refusal(refused[0])
    if refused or (once and (fleet.unnamed or fleet.unreadable)):
        raise typer.Exit(FAILED)
    if once and not fleet.followers:
        raise Failure(
            "There is nothing to follow.",
            hint="No file of the directory that matches is a SQLite database.",
            code="nothing_found",
        )


def _refusal(follower: "Follower") -> Failure:
    """As the command ends with it."""
    from app.client import ProblemError  # noqa: PLC0415 - not on the way to --help

    status, cause = follower.status, follower.refused and follower.refused.__cause__
    hint = HINTS.get(str(status.refusal_code)) or _HINTS.get(str(status.refusal_code), "")
    told = str(status.refusal)
    if isinstance(cause, ProblemError):
        told = told.removesuffix(f" {API_HINTS.get(str(status.refusal_code), '')}")
    return Failure(told, hint=hint, code=str(status.refusal_code))
