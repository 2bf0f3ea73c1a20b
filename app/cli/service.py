"""`serve` and `recover`: the commands that are the service rather than talk to one.

The service's imports cost seconds; they happen here, inside the commands, only.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli.failures import Failure, wrong_usage
from app.cli.screen import Column, Screen
from app.cli.session import session_of
from app.core.base.errors import BopError, FatalError, StartRefused

if TYPE_CHECKING:
    from app.core.services.recovery import RecoverReport
    from app.settings import Settings


def serve(
    context: typer.Context,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every setting, redacted, and end.")
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Claim a remote prefix that another node owns."),
    ] = False,
) -> None:
    """Run the service. Settings are environment variables BOP_…; see --print-config."""
    screen = session_of(context).screen
    settings = loaded_settings(**({"take_over": True} if take_over else {}))
    if print_config:
        from app.settings import unknown_variables  # noqa: PLC0415 - not on the way to --help

        show_settings(screen, settings)
        for name in unknown_variables():
            screen.note(f"{name} is set, and is no setting.")
        return
    with started_failures():
        from app.main import serve as run  # noqa: PLC0415 - the HTTP stack

        exit_code = run(settings)
    raise typer.Exit(exit_code)


def recover(context: typer.Context) -> None:
    """Rebuild the manifest of an empty data directory from the remote store alone."""
    screen = session_of(context).screen
    settings = loaded_settings()
    with started_failures(), screen.meter() as meter:
        from app.container import recover as rebuild  # noqa: PLC0415 - opens LMDB and S3

        report = asyncio.run(
            rebuild(
                settings,
                progress=lambda read, total: meter("Reading generation documents", read, total),
            )
        )
    place = settings.redacted()["BOP_REMOTE_URL"] or settings.effective_remote_url
    show_recovered(screen, report, remote_url=place)


def loaded_settings(**given: Any) -> "Settings":
    """Raises Failure, of wrong usage, naming each variable that is wrong."""
    from pydantic import ValidationError  # noqa: PLC0415 - not on the way to --help

    from app.settings import Settings  # noqa: PLC0415 - not on the way to --help

    try:
        return Settings(**given)
    except ValidationError as error:
        wrong = [
            f"BOP_{str(one['loc'][0]).upper()}: {one['msg']}"
            if one["loc"]
            else str(one["msg"]).removeprefix("Value error, ")
            for one in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise wrong_usage(
            f"The settings are wrong. {'; '.join(wrong)}.",
            hint="They come from the environment and from the file that BOP_CONFIG_FILE names.",
        ) from error
    except (OSError, ValueError) as error:
        raise wrong_usage(f"BOP_CONFIG_FILE cannot be used: {error}.") from error


@contextmanager
def started_failures() -> Iterator[None]:
    """Refusals to start, as failures."""
    try:
        yield
    except StartRefused as error:
        raise Failure(str(error), code="start_refused") from error
    except FatalError as error:
        raise Failure(f"The service ended itself: {error}", code="fatal") from error
    except BopError as error:
        raise Failure(error.detail, hint=error.hint, code=error.code) from error
    except OSError as error:
        raise Failure(f"The operating system refused: {error}.", code="os_error") from error


def show_settings(screen: Screen, settings: "Settings") -> None:
    """As TOML, which BOP_CONFIG_FILE reads back."""
    shown = settings.redacted()
    if screen.as_json:
        screen.document(shown)
        return
    lines = [
        f"# {name} is not set" if value is None else f"{name} = {json.dumps(value)}"
        for name, value in shown.items()
    ]
    screen.raw(("\n".join(lines) + "\n").encode())


def show_recovered(screen: Screen, report: "RecoverReport", *, remote_url: str) -> None:
    if screen.as_json:
        screen.document({"databases": report.databases, "skipped": report.skipped})
        return
    screen.table(
        [
            Column(name="DATABASE"),
            Column(name="GENERATIONS", right=True),
            Column(name="CHUNKS", right=True),
            Column(name="LAST LSN", right=True),
            Column(name="NEXT LSN", right=True),
        ],
        [
            [
                f"{one.tenant}/{one.database}",
                str(one.generations),
                str(one.chunks),
                str(one.last_lsn),
                str(one.next_lsn),
            ]
            for one in report.databases
        ],
        empty=f"The remote store {remote_url} holds no database; nothing was recovered.",
    )
    for skipped in report.skipped:
        screen.note(f"Left out: {skipped}; a newer database has its name.")
