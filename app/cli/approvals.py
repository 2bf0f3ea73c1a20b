"""`approvals`, `leases release`, `audit`, `manifest backup`, `jobs explain`: operators' acts."""

from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.databases import DatabaseArgument, LimitOption
from app.cli.jobs import JobArgument
from app.cli.screen import Column
from app.cli.session import Session, parse_id, parse_name, session_of
from app.cli.units import bytes_text, time_text

if TYPE_CHECKING:
    from app.client import BopClient
    from app.client.admin import Approval, AuditEntry

approvals = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Acts that wait for a second person."
)

ApprovalArgument = Annotated[
    str, typer.Argument(metavar="APPROVAL", show_default=False, callback=parse_id)
]


def release_lease(
    context: typer.Context,
    name: DatabaseArgument,
    chunk_id: Annotated[int, typer.Argument(metavar="CHUNK", min=0, show_default=False)],
    reason: Annotated[str, typer.Option(help="Why; it is kept.", show_default=False)],
) -> None:
    """Take a chunk's lease from its holder; another principal approves it."""
    session = session_of(context)
    tenant, database = parse_name(name)
    found = session.run(
        lambda client: client.admin.release_lease(tenant, database, chunk_id, reason=reason)
    )
    show_approval(session, found)
    if not found.released:
        session.screen.note(
            f"Another principal runs 'bop-checkpoint approvals approve {found.approval_id}'."
        )


@approvals.command("list")
def list_approvals(context: typer.Context, limit: LimitOption = 100) -> None:
    """List approvals, newest first."""
    session = session_of(context)

    async def work(client: "BopClient") -> "list[Approval]":
        return [one async for one in client.admin.approvals(limit=limit)]

    found = session.run(work)
    if session.screen.as_json:
        session.screen.document({"items": found})
        return
    session.screen.table(
        [
            Column(name="APPROVAL"),
            Column(name="STATE"),
            Column(name="DATABASE"),
            Column(name="CHUNK", right=True),
            Column(name="ASKED BY"),
            Column(name="REASON"),
            Column(name="EXPIRES"),
            Column(name="DECIDED BY"),
        ],
        [
            [
                one.approval_id,
                one.state,
                f"{one.tenant}/{one.database}",
                str(one.chunk_id),
                one.requested_by,
                one.reason,
                time_text(one.expires_at),
                one.decided_by or "-",
            ]
            for one in found
        ],
        empty="Nothing waits, and nothing was decided.",
    )


@approvals.command()
def approve(context: typer.Context, approval_id: ApprovalArgument) -> None:
    """Do what another principal asked for."""
    session = session_of(context)
    show_approval(session, session.run(lambda client: client.admin.approve(approval_id)))


@approvals.command()
def reject(context: typer.Context, approval_id: ApprovalArgument) -> None:
    """End it; nothing is done."""
    session = session_of(context)
    show_approval(session, session.run(lambda client: client.admin.reject(approval_id)))


def audit(context: typer.Context, limit: LimitOption = 100) -> None:
    """Show what operators did, newest first."""
    session = session_of(context)

    async def work(client: "BopClient") -> "list[AuditEntry]":
        return [one async for one in client.admin.audit(limit=limit)]

    found = session.run(work)
    if session.screen.as_json:
        session.screen.document({"items": found})
        return
    session.screen.table(
        [
            Column(name="AT"),
            Column(name="PRINCIPAL"),
            Column(name="ACTION"),
            Column(name="TENANT"),
            Column(name="OUTCOME"),
            Column(name="REASON"),
        ],
        [
            [
                time_text(one.at),
                one.principal,
                one.action,
                one.tenant or "-",
                one.outcome if one.code is None else f"{one.outcome} ({one.code})",
                one.reason or "-",
            ]
            for one in found
        ],
        empty="Nothing was done.",
    )


def backup(context: typer.Context) -> None:
    """Copy the manifest, on the service's own disk, while it goes on."""
    session = session_of(context)
    found = session.run(lambda client: client.admin.backup_manifest())
    if session.screen.as_json:
        session.screen.document(found)
        return
    session.screen.facts(
        {
            "path": found.path,
            "size": bytes_text(found.bytes),
            "last sequence": str(found.sequence),
        }
    )


def explain(context: typer.Context, job_id: JobArgument) -> None:
    """Say what a job waits for, and who has that."""
    session = session_of(context)
    found = session.run(lambda client: client.admin.explain_job(job_id))
    if session.screen.as_json:
        session.screen.document(found)
        return
    session.screen.note(str(found["summary"]))
    session.screen.table(
        [Column(name="WAITS FOR"), Column(name="HELD BY"), Column(name="DETAIL")],
        [
            [str(one["kind"]), str(one["job_id"] or "-"), str(one["detail"])]
            for one in found["waits_for"]
        ],
        empty="It waits for nothing.",
    )


def show_approval(session: Session, approval: "Approval") -> None:
    if session.screen.as_json:
        session.screen.document(approval)
        return
    session.screen.facts(
        {
            "approval": approval.approval_id,
            "state": approval.state,
            "lease": f"{approval.tenant}/{approval.database} chunk {approval.chunk_id}",
            "held by": f"{approval.job_id} (token {approval.token})",
            "released": "yes" if approval.released else "no",
            "reason": approval.reason,
            "asked by": approval.requested_by,
            "expires": time_text(approval.expires_at),
            "decided by": approval.decided_by or "-",
        }
    )
