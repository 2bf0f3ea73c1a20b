"""What of a body is stored, and what of it is read for that."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from app.core.base.errors import TransactionTooLarge
from app.core.formats.frame_run import FrameFooter, frames_of, parse_footer
from app.core.formats.sqlite_wal import WAL_HEADER_BYTES, parse_wal_header
from app.core.formats.sqlite_wal_ingestion import AcceptFrom
from app.core.formats.sqlite_wal_scanner import ScanEnd
from app.core.services.image_body import changed_pages, differing_blocking, plan_image
from app.core.services.page_payloads import ENTRY_BYTES_TARGET, WINDOW_BYTES, payload_bytes
from app.core.services.wal_body import frames_max, plan_frames, scan_blocking
from tests.helpers.sqlite_logs import commit_sizes, frame_offsets, newest_pages, real_log

PAGE = 512
FRAME = PAGE + 24


@dataclass
class Bytes:
    data: bytes
    read: int = 0
    largest: int = 0
    places: list[int] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_blocking(self, offset: int, length: int) -> bytes:
        assert offset + length <= len(self.data)
        self.read += length
        self.largest = max(self.largest, length)
        self.places.append(offset)
        return self.data[offset : offset + length]


def shrinking(connection) -> None:
    """Transactions that spill pages which their own commit then leaves outside."""
    connection.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, x)")
    for size in (300, 700, 2000):
        connection.execute("BEGIN")
        connection.executemany("INSERT INTO t (x) VALUES (randomblob(?))", [(size,)] * 120)
        connection.execute("DELETE FROM t WHERE id % 2")
        connection.execute("COMMIT")
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO t (x) VALUES (randomblob(?))", [(900,)] * 200)
    connection.execute("DELETE FROM t WHERE id > 10")
    connection.execute("PRAGMA incremental_vacuum")
    connection.execute("COMMIT")
    connection.execute("INSERT INTO t (x) VALUES (1)")


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("log") / "db"
    return real_log(path, shrinking, page_size=PAGE, auto_vacuum=2)


def from_start(log: bytes) -> AcceptFrom:
    return AcceptFrom(
        position=parse_wal_header(log), skip_bytes=WAL_HEADER_BYTES, must_continue=False
    )


def planned(log: bytes, *, budget_bytes: int = 1 << 30):
    body = Bytes(log)
    accept = from_start(log)
    scanned = scan_blocking(body, accept)
    assert scanned.result.end is ScanEnd.WHOLE
    return plan_frames(body, scanned, accept, replaced=None, budget_bytes=budget_bytes), scanned


def loaded(entries) -> list[tuple[int, int, bytes]]:
    found = []
    for number, entry in enumerate(entries):
        payload = entry.load_blocking()
        assert len(payload) == entry.payload_bytes
        frames = frames_of(payload, page_size=PAGE)
        assert len(frames) == entry.count
        assert frames.page_nos.tolist() == entry.page_nos.tolist()
        assert frames.commit_sizes.tolist() == entry.commit_sizes.tolist()
        assert (frames.footer is not None) == (number == len(entries) - 1)
        found += [
            (
                int(frames.page_nos[index]),
                int(frames.commit_sizes[index]),
                bytes(frames.page(index)),
            )
            for index in range(len(frames))
        ]
    return found


def test_entries_hold_the_frames_that_count(log):
    plan, scanned = planned(log)
    expected = []
    pending = []
    for at in frame_offsets(log):
        page_no, size = (int.from_bytes(log[at + i : at + i + 4], "big") for i in (0, 4))
        pending.append((page_no, size, log[at + 24 : at + FRAME]))
        if size:
            expected += [one for one in pending if one[0] <= size or one[1]]
            pending = []
    stored = loaded(plan.entries)
    assert stored == expected
    assert len(stored) < len(commit_sizes(log))  # some were spilled in vain
    assert max(entry.payload_bytes for entry in plan.entries) <= ENTRY_BYTES_TARGET + 64
    assert plan.commits == sum(size > 0 for size in commit_sizes(log))
    assert plan.position.offset == len(log)
    footer = parse_footer(plan.entries[-1].load_blocking(), page_size=PAGE)
    assert (footer.page_count, footer.position) == (plan.page_count, plan.position)
    # what a reader then finds is what SQLite would
    newest = newest_pages(scanned.page_nos, page_count=plan.page_count, page_size=PAGE)
    last = {page_no: page for page_no, _, page in stored if page_no <= plan.page_count}
    assert {
        int(scanned.page_nos[one]): log[32 + one * FRAME + 24 : 32 + (one + 1) * FRAME]
        for one in newest.tolist()
    } == last


def test_a_scan_reads_block_by_block(log):
    body = Bytes(log * 1)
    scan_blocking(body, from_start(log))
    assert body.read == len(log)
    assert body.largest <= 1024 * 1024


def test_a_body_over_the_budget_is_taken_up_to_a_commit(log):
    whole, _ = planned(log)
    total = sum(entry.count for entry in whole.entries)
    first_commit = next(index for index, size in enumerate(commit_sizes(log)) if size) + 1
    with pytest.raises(TransactionTooLarge) as refusal:
        planned(log, budget_bytes=first_commit * FRAME)
    assert refusal.value.fields["transaction_bytes"] == first_commit * FRAME
    last_commit = 0
    for budget_bytes in range(first_commit * FRAME + 200, total * FRAME + 50_000, 11_000):
        plan, _ = planned(log, budget_bytes=budget_bytes)
        stored = loaded(plan.entries)
        assert stored == loaded(whole.entries)[: len(stored)]
        assert stored[-1][1] == plan.page_count > 0
        at = plan.position.offset
        assert (plan.position.checksum1, plan.position.checksum2) == tuple(
            int.from_bytes(log[at - FRAME + i : at - FRAME + i + 4], "big") for i in (16, 20)
        )
        assert commit_sizes(log[:at])[-1] == plan.page_count
        assert plan.commits == sum(size > 0 for size in commit_sizes(log[:at]))
        used = sum(80 + entry.payload_bytes for entry in plan.entries)
        assert used <= budget_bytes
        # what is left goes on there
        rest = Bytes(log[at:])
        accept = AcceptFrom(position=plan.position, skip_bytes=0, must_continue=True)
        assert scan_blocking(rest, accept).result.end is ScanEnd.WHOLE
        assert plan.commits >= last_commit
        last_commit = plan.commits
    assert last_commit == whole.commits


@pytest.mark.parametrize("page_size", [512, 4096, 65536])
def test_what_fits_a_budget(page_size):
    footer = FrameFooter(page_count=1)
    per_entry = max(1, ENTRY_BYTES_TARGET // (24 + page_size))
    for budget_bytes in (0, 1, 700, 5000, 70_000, 1_000_000, 1_234_567):
        most = frames_max(budget_bytes, page_size)

        def needed(count: int) -> int:
            entries = -(-count // per_entry)
            return entries * 80 + payload_bytes(count, page_size=page_size, footer=footer)

        assert most == 0 or needed(most) <= budget_bytes
        assert needed(most + 1) > budget_bytes


def test_an_image_becomes_frames():
    source = np.random.default_rng(5)
    image = source.integers(0, 256, size=400 * PAGE, dtype=np.uint8).tobytes()
    stored = bytearray(image[: 300 * PAGE])
    for page_no in (1, 7, 8, 9, 300):
        stored[page_no * PAGE - 1] ^= 1
    body = Bytes(image)
    found = [
        differing_blocking(
            body, first=first, count=100, page_size=PAGE,
            stored=bytes(stored[(first - 1) * PAGE : (first + 99) * PAGE]),
        )
        for first in (1, 101, 201)
    ]  # fmt: skip
    pages = changed_pages(found, page_count=400, compared=300, page_size=PAGE)
    expected = [1, 7, 8, 9, 300, *range(301, 401)]
    assert pages.tolist() == expected
    footer = FrameFooter(page_count=400)
    entries = plan_image(body, pages, page_size=PAGE, footer=footer, budget_bytes=1 << 30)
    assert loaded(entries) == [
        (page_no, 400 if page_no == 400 else 0, image[(page_no - 1) * PAGE : page_no * PAGE])
        for page_no in expected
    ]
    with pytest.raises(TransactionTooLarge):
        plan_image(body, pages, page_size=PAGE, footer=footer, budget_bytes=len(pages) * FRAME)


@pytest.mark.parametrize("left_out", [[], [2], [1500, 1501, 4095]])
def test_frames_of_an_image_are_made_for_many_entries_at_once(left_out):
    count = 3 * WINDOW_BYTES // PAGE
    image = np.random.default_rng(6).bytes(count * PAGE)
    body = Bytes(image)
    pages = np.setdiff1d(np.arange(1, count + 1, dtype=np.uint32), left_out)
    footer = FrameFooter(page_count=count)
    entries = plan_image(body, pages, page_size=PAGE, footer=footer, budget_bytes=1 << 30)
    expected = [
        (page_no, count if page_no == count else 0, image[(page_no - 1) * PAGE : page_no * PAGE])
        for page_no in pages.tolist()
    ]
    assert loaded(entries) == expected
    assert body.read == len(pages) * PAGE
    assert len(body.places) <= 4 + 2 * len(left_out), "many entries' pages at once"
    assert body.largest <= WINDOW_BYTES
    # in any order
    assert (
        loaded(entries[5:6] + entries[-1:])
        == expected[5 * 122 : 6 * 122] + expected[-entries[-1].count :]
    )
    assert parse_footer(entries[-1].load_blocking(), page_size=PAGE) == footer


def test_an_image_that_differs_in_nothing_takes_page_one():
    nothing = np.zeros(0, dtype=np.uint32)
    assert changed_pages([nothing], page_count=4, compared=4, page_size=PAGE).tolist() == [1]


def test_the_lock_byte_page_of_an_image_is_left_out():
    locked = 0x40000000 // 65536 + 1
    pages = changed_pages([], page_count=locked + 1, compared=locked - 2, page_size=65536)
    assert pages.tolist() == [locked - 1, locked + 1]
