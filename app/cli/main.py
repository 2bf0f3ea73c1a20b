"""`bop-checkpoint`: the command line. It speaks HTTP; only `serve`, `recover`, `fsck --data-dir`
and `demo` open or start anything. Exit 0: done; 1: failed; 2: wrong usage.
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from app import __version__
from app.cli import (
    approvals,
    cold_scan,
    collection,
    databases,
    demo,
    generation_jobs,
    history,
    jobs,
    limits,
    operations,
    records,
    replicate,
    restore,
    service,
    tokens,
    truncations,
    upkeep,
)
from app.cli.failures import Failure, wrong_usage
from app.cli.screen import Output, Screen
from app.cli.session import DEFAULT_URL, Session, Surroundings

_GLOBAL_OPTIONS = ("--url", "--token", "--output")


class RootGroup(TyperGroup):
    """Takes the global options anywhere on the line, and shows failures in one way."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        arguments = hoisted(sys.argv[1:] if args is None else args)
        screen = Screen("json" if wants_json(arguments) else "table")
        try:
            exit_code = super().main(
                arguments,
                prog_name=prog_name or "bop-checkpoint",
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
        except typer.TyperException as error:
            exit_code = error.exit_code
            if type(error).__name__ != "NoArgsIsHelpError":  # its help has been shown
                screen.failure(_usage_failure(error))
        except typer.Abort:
            exit_code = 1
        except Failure as failure:
            exit_code = failure.exit_code
            screen.failure(failure)
        except UnicodeEncodeError as error:
            misread = wrong_usage(f"{error.object!r} is no UTF-8.")
            exit_code = misread.exit_code
            screen.failure(misread)
        if standalone_mode:
            screen.let_go()
            sys.exit(exit_code or 0)
        return exit_code

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """In groups, as rich would show them, at a third of the time."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.commands[name]
            group = str(getattr(command, "rich_help_panel", "") or "Commands")
            groups.setdefault(group, []).append((name, command.get_short_help_str(limit=100)))
        for group, rows in groups.items():
            with formatter.section(group):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=RootGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="--url, --token and --output may stand anywhere on the line.",
)


def tell_version(asked: bool) -> None:
    if asked:
        Screen("table").raw(f"bop-checkpoint {__version__}\n".encode())
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    url: Annotated[
        str, typer.Option("--url", envvar="BOP_URL", help="Where the service answers.")
    ] = DEFAULT_URL,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="BOP_TOKEN", help="Better in the environment."),
    ] = None,
    output: Annotated[
        Output, typer.Option("--output", help="For people, or for programs.")
    ] = "table",
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=tell_version)
    ] = False,
) -> None:
    """Durable, incremental, provably restorable checkpoints for page and record databases."""
    given = context.obj
    context.obj = Session(
        url=url,
        token=token,
        screen=Screen(output),
        surroundings=given if isinstance(given, Surroundings) else Surroundings(),
    )


app.command("serve", rich_help_panel="Service")(service.serve)
app.command("recover", rich_help_panel="Service")(service.recover)
app.command("demo", rich_help_panel="Service")(demo.demo)
app.command("fsck", rich_help_panel="Service")(operations.fsck)
app.add_typer(tokens.app, name="tokens", rich_help_panel="Service")
app.add_typer(databases.app, name="databases", rich_help_panel="Data")
app.command("append", rich_help_panel="Data")(records.append)
app.command("records", rich_help_panel="Data")(records.read)
app.command("replicate", rich_help_panel="Data")(replicate.replicate)
app.command("restore", rich_help_panel="Data")(restore.restore)
app.command("cold-scan", rich_help_panel="Data")(cold_scan.cold_scan)
app.command("checkpoint", rich_help_panel="Checkpoints")(jobs.checkpoint)
app.command("truncate", rich_help_panel="Checkpoints")(truncations.truncate)
app.command("generations", rich_help_panel="Checkpoints")(history.list_generations)
app.add_typer(history.snapshots, name="snapshots", rich_help_panel="Checkpoints")
app.command("fork", rich_help_panel="Checkpoints")(history.fork)
databases.app.command("update")(history.update)
databases.app.command("delete")(collection.delete_database)
app.add_typer(jobs.app, name="jobs", rich_help_panel="Checkpoints")
operations.leases.command("release")(approvals.release_lease)
operations.manifest.command("backup")(approvals.backup)
jobs.app.command("explain")(approvals.explain)
app.add_typer(approvals.approvals, name="approvals", rich_help_panel="Operations")
app.command("audit", rich_help_panel="Operations")(approvals.audit)
app.add_typer(operations.leases, name="leases", rich_help_panel="Operations")
app.add_typer(limits.flags, name="flags", rich_help_panel="Operations")
app.add_typer(limits.quota, name="quota", rich_help_panel="Operations")
app.add_typer(upkeep.queue, name="queue", rich_help_panel="Operations")
app.command("gc", rich_help_panel="Operations")(collection.gc)
app.command("janitor", rich_help_panel="Operations")(upkeep.janitor)
app.command("verify", rich_help_panel="Operations")(generation_jobs.verify)
app.command("download", rich_help_panel="Operations")(generation_jobs.download)
app.add_typer(operations.manifest, name="manifest", rich_help_panel="Operations")


def main() -> None:
    """The console script."""
    app()


def hoisted(arguments: Sequence[str]) -> list[str]:
    """The arguments with the global options before the command, where the parser wants them.
    What stands behind `--` stays.
    """
    front: list[str] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            rest += [argument, *waiting]
        elif argument in _GLOBAL_OPTIONS:
            front += [argument, *(value for value in [next(waiting, None)] if value is not None)]
        elif argument.startswith(tuple(f"{option}=" for option in _GLOBAL_OPTIONS)):
            front.append(argument)
        else:
            rest.append(argument)
    return front + rest


def wants_json(arguments: Sequence[str]) -> bool:
    """Known before parsing, so that wrong usage is told in the format asked for."""
    return "--output=json" in arguments or ("--output", "json") in pairwise(arguments)


def _usage_failure(error: typer.TyperException) -> Failure:
    context = getattr(error, "ctx", None)
    hint = f"See '{context.command_path} --help'." if context is not None else ""
    return wrong_usage(error.format_message().replace("Value error, ", "", 1), hint=hint)


if __name__ == "__main__":
    main()
