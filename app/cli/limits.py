"""`flags` and `quota`."""

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.screen import Column, Screen
from app.cli.session import parse_plain_name, session_of
from app.cli.units import bytes_text, parse_bytes

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.limits import Flags, GlobalLimit, QuotaUse, TenantLimits

flags = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="What is switched on for a tenant."
)
quota = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Room on the disk: limits and use."
)

INTERVAL = "checkpoint_interval_seconds"
SWITCHES = (
    "enable_checkpoints",
    "enable_chunk_deltas",
    "enable_append_only_truncation",
    "enable_cold_scan",
)
_WORDS = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", callback=parse_plain_name)]
LimitOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Bytes, or as in 10GiB; 'none' lifts the limit.")
]


@flags.command("show")
def show_flags(context: typer.Context, tenant: TenantArgument) -> None:
    """Show a tenant's feature flags."""
    session = session_of(context)
    _show_flags(session.screen, session.run(lambda client: client.limits.flags(tenant)))


@flags.command("set")
def set_flags(
    context: typer.Context,
    tenant: TenantArgument,
    values: Annotated[
        list[str],
        typer.Argument(
            metavar="FLAG=VALUE...",
            help=f"{', '.join(SWITCHES)}: true or false. {INTERVAL}: seconds, 0 for only on "
            "demand and by WAL pressure, or default.",
        ),
    ],
) -> None:
    """Change some of a tenant's feature flags. They hold at once, for new work."""
    session = session_of(context)
    changes = dict(parse_flag(value) for value in values)
    _show_flags(
        session.screen, session.run(lambda client: client.limits.set_flags(tenant, changes))
    )


def parse_flag(text: str) -> tuple[str, bool | int | None]:
    name, _, value = text.partition("=")
    word = value.strip().lower()
    if name == INTERVAL:
        if word == "default":
            return name, None
        if word.isdecimal():
            return name, int(word)
        raise typer.BadParameter(f"{name} takes seconds or 'default', not {value!r}.")
    if name not in SWITCHES:
        raise typer.BadParameter(f"There is no flag {name!r}; see 'flags set --help'.")
    if word not in _WORDS:
        raise typer.BadParameter(f"{name} takes true or false, not {value!r}.")
    return name, _WORDS[word]


@quota.command("show")
def show_quota(
    context: typer.Context,
    tenant: Annotated[
        str | None,
        typer.Argument(
            metavar="[TENANT]", help="Only this tenant's limits.", callback=parse_plain_name
        ),
    ] = None,
) -> None:
    """Show limits and use: in all, by tenant, by job; or what is set for a tenant."""
    session = session_of(context)
    if tenant is not None:
        name = tenant
        _show_limits(session.screen, session.run(lambda client: client.limits.tenant(name)))
        return
    _show_use(session.screen, session.run(lambda client: client.limits.quota()))


@quota.command("set")
def set_quota(
    context: typer.Context,
    tenant: Annotated[
        str | None,
        typer.Argument(
            metavar="[TENANT]", help="Without one, the limit of all.", callback=parse_plain_name
        ),
    ] = None,
    limit: LimitOption = None,
    job_limit: LimitOption = None,
) -> None:
    """Set the global limit, or a tenant's. A limit that is not named stays as it is."""
    session = session_of(context)
    if limit is None and job_limit is None:
        raise typer.BadParameter("Name --limit or --job-limit.")
    limit_bytes, job_limit_bytes = _size(limit), _size(job_limit)
    if tenant is None:
        if job_limit is not None:
            raise typer.BadParameter("--job-limit is for a tenant.")
        held: GlobalLimit = session.run(lambda client: client.limits.set_global(limit_bytes))
        _show_facts(session.screen, held, {"global": bytes_text(held.global_bytes)})
        return
    name = tenant

    async def work(client: "BopClient") -> "TenantLimits":
        known = await client.limits.tenant(name)
        return await client.limits.set_tenant(
            name,
            limit_bytes=known.limit_bytes if limit is None else limit_bytes,
            job_limit_bytes=known.job_limit_bytes if job_limit is None else job_limit_bytes,
        )

    _show_limits(session.screen, session.run(work))


def _size(text: str | None) -> int | None:
    if text is None or text.lower() == "none":
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}") from error


def _limit_text(limit_bytes: int | None) -> str:
    return "none" if limit_bytes is None else bytes_text(limit_bytes)


def _show_flags(screen: Screen, shown: "Flags") -> None:
    interval = shown.checkpoint_interval_seconds
    _show_facts(
        screen,
        shown,
        {name: "on" if getattr(shown, name) else "off" for name in SWITCHES}
        | {INTERVAL: str(interval)},
    )


def _show_limits(screen: Screen, shown: "TenantLimits") -> None:
    _show_facts(
        screen,
        shown,
        {
            "tenant": shown.tenant,
            "limit": _limit_text(shown.limit_bytes),
            "job limit": _limit_text(shown.job_limit_bytes),
        },
    )


def _show_facts(screen: Screen, document: object, facts: dict[str, str]) -> None:
    if screen.as_json:
        screen.document(document)
    else:
        screen.facts(facts)


def _show_use(screen: Screen, use: "QuotaUse") -> None:
    if screen.as_json:
        screen.document(use)
        return
    everything = use.everything
    rows = [_use_row("everything", "", everything.limit_bytes, everything.used_bytes)]
    rows += [_use_row("tenant", one.tenant, one.limit_bytes, one.used_bytes) for one in use.tenants]
    rows += [
        ["job", f"{one.job_id} of {one.tenant}", "-", bytes_text(one.reserved_bytes)]
        for one in use.jobs
    ]
    screen.table(
        [
            Column(name="OF"),
            Column(name="NAME"),
            Column(name="LIMIT", right=True),
            Column(name="USED", right=True),
        ],
        rows,
        empty="",
    )


def _use_row(of: str, name: str, limit_bytes: int | None, used_bytes: int) -> list[str]:
    return [of, name, _limit_text(limit_bytes), bytes_text(used_bytes)]
