"""A WAL body: verified from end to end, then cut into the entries that will be stored."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from app.core.base.errors import TransactionTooLarge
from app.core.formats.frame_run import FOOTER_BYTES, FrameFooter, kept_frames
from app.core.formats.segment import ENTRY_HEADER_BYTES
from app.core.formats.sqlite_wal import FrameRun, Indices, WalPosition, Words, frame_bytes
from app.core.formats.sqlite_wal_ingestion import AcceptFrom
from app.core.formats.sqlite_wal_scanner import ScanResult, WalScanner
from app.core.services.page_payloads import Body, LogFramesPayload, entry_frames

PIECE_BYTES = 1024 * 1024
_CHECKSUMS = struct.Struct(">16x2I")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedBody:
    """What the scan came to, and the frames up to the last commit. 8 bytes a frame."""

    result: ScanResult
    page_nos: Words
    commit_sizes: Words


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFrames:
    """What is stored of a body: whole transactions, and where they leave log and database."""

    entries: Sequence[LogFramesPayload]
    position: WalPosition
    commits: int
    page_count: int


def scan_blocking(body: Body, accept: AcceptFrom) -> ScannedBody:
    scanner = WalScanner(
        accept.position, skip_bytes=accept.skip_bytes, must_continue=accept.must_continue
    )
    runs: list[tuple[Words, Words]] = []
    at = 0
    while at < body.size_bytes and not scanner.ended:
        piece = body.read_blocking(at, min(PIECE_BYTES, body.size_bytes - at))
        at += len(piece)
        runs.extend(map(_numbers, scanner.feed(piece)))
    last, result = scanner.finish()
    runs.extend(map(_numbers, last))
    if not result.frames:
        nothing = np.zeros(0, dtype=np.uint32)
        return ScannedBody(result=result, page_nos=nothing, commit_sizes=nothing)
    return ScannedBody(
        result=result,
        page_nos=np.concatenate([pages for pages, _ in runs])[: result.frames],
        commit_sizes=np.concatenate([sizes for _, sizes in runs])[: result.frames],
    )


def plan_frames(
    body: Body,
    scanned: ScannedBody,
    accept: AcceptFrom,
    *,
    replaced: WalPosition | None,
    budget_bytes: int,
) -> PlannedFrames:
    """As many whole transactions as fit the budget. Raises TransactionTooLarge where that is not
    even one.
    """
    page_size, size = accept.position.page_size, frame_bytes(accept.position.page_size)
    page_nos, commit_sizes = scanned.page_nos, scanned.commit_sizes
    kept = kept_frames(page_nos, commit_sizes, page_size=page_size)
    commits = np.flatnonzero(commit_sizes)
    stored = np.searchsorted(kept, commits, side="right")  # frames up to each commit
    fitting = int(np.searchsorted(stored, frames_max(budget_bytes, page_size), side="right"))
    if not fitting:
        raise TransactionTooLarge(
            f"A transaction of {int(stored[0]) * size} bytes can never fit the WAL budget.",
            wal_budget_bytes=budget_bytes,
            transaction_bytes=int(stored[0]) * size,
        )
    last = int(commits[fitting - 1])
    kept = kept[: int(stored[fitting - 1])]
    position = scanned.result.position
    if fitting < len(commits):
        position = _position_after(body, accept, position, frame=last)
    page_count = int(commit_sizes[last])
    return PlannedFrames(
        entries=_entries(
            body, kept, scanned, start=accept.skip_bytes, page_size=page_size,
            footer=FrameFooter(page_count=page_count, position=position, replaced=replaced),
        ),
        position=position,
        commits=fitting,
        page_count=page_count,
    )  # fmt: skip


def frames_max(budget_bytes: int, page_size: int) -> int:
    """How many frames of one request fit into so many bytes of WAL."""
    per_entry = entry_frames(page_size)
    entry_bytes = ENTRY_HEADER_BYTES + per_entry * frame_bytes(page_size)
    whole, rest = divmod(max(budget_bytes - FOOTER_BYTES, 0), entry_bytes)
    return whole * per_entry + max(rest - ENTRY_HEADER_BYTES, 0) // frame_bytes(page_size)


def _numbers(run: FrameRun) -> tuple[Words, Words]:
    """Without the frames themselves: they are read again when they are written."""
    return run.page_nos, run.commit_sizes


def _position_after(body: Body, accept: AcceptFrom, end: WalPosition, *, frame: int) -> WalPosition:
    size = frame_bytes(end.page_size)
    head = body.read_blocking(accept.skip_bytes + frame * size, _CHECKSUMS.size)
    checksum1, checksum2 = _CHECKSUMS.unpack(head)
    return replace(
        end, offset=accept.position.offset + (frame + 1) * size, checksum1=checksum1,
        checksum2=checksum2,
    )  # fmt: skip


def _entries(
    body: Body,
    kept: Indices,
    scanned: ScannedBody,
    *,
    start: int,
    page_size: int,
    footer: FrameFooter,
) -> list[LogFramesPayload]:
    per_entry, size = entry_frames(page_size), frame_bytes(page_size)
    entries: list[LogFramesPayload] = []
    for first in range(0, len(kept), per_entry):
        frames = kept[first : first + per_entry]
        entries.append(
            LogFramesPayload(
                body=body,
                starts=start + frames * size,
                page_size=page_size,
                page_nos=scanned.page_nos[frames],
                commit_sizes=scanned.commit_sizes[frames],
                footer=footer if first + per_entry >= len(kept) else None,
            )
        )
    return entries
