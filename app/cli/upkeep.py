"""`queue` and `janitor`."""

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.failures import FAILED
from app.cli.screen import Screen
from app.cli.session import session_of
from app.cli.units import bytes_text, count_text

if TYPE_CHECKING:
    from app.client.upkeep import QueueState

AGE_SECONDS_MAX = 366 * 86_400

queue = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The job queue as a whole.")


@queue.command("show")
def show_queue(context: typer.Context) -> None:
    """Show whether new jobs are taken, and how many wait and run."""
    session = session_of(context)
    _show_queue(session.screen, session.run(lambda client: client.upkeep.queue()))


@queue.command("drain")
def drain_queue(context: typer.Context) -> None:
    """Take no new jobs, also after a restart; those that are there go on to their end."""
    session = session_of(context)
    _show_queue(session.screen, session.run(lambda client: client.upkeep.drain_queue()))


@queue.command("resume")
def resume_queue(context: typer.Context) -> None:
    """Take new jobs again."""
    session = session_of(context)
    _show_queue(session.screen, session.run(lambda client: client.upkeep.resume_queue()))


def janitor(
    context: typer.Context,
    max_age: Annotated[
        float,
        typer.Option(
            min=0, max=AGE_SECONDS_MAX, metavar="SECONDS", help="What changed within them stays."
        ),
    ] = 0,
) -> None:
    """Remove scratch of no live job, and make the quota agree with the files that are there."""
    session = session_of(context)
    report = session.run(lambda client: client.upkeep.run_janitor(max_age_seconds=max_age))
    if session.screen.as_json:
        session.screen.document(report)
    else:
        session.screen.facts(
            {
                "looked at": count_text(report.scanned),
                "removed": count_text(len(report.removed)),
                "not removed": ", ".join(report.failed) or "0",
                "freed": bytes_text(report.removed_bytes),
                "reservations released": bytes_text(report.released_bytes),
                "files accounted": count_text(report.quota_files),
                "accounts corrected": count_text(report.quota_corrected),
            }
        )
    if report.failed:
        raise typer.Exit(FAILED)


def _show_queue(screen: Screen, shown: "QueueState") -> None:
    if screen.as_json:
        screen.document(shown)
        return
    screen.facts(
        {
            "state": shown.state,
            "pending": count_text(shown.pending),
            "in flight": count_text(shown.in_flight),
            "at most": count_text(shown.depth_max),
        }
    )
