"""An application's SQLite log: frames with checksums that hold, and the states commits leave."""

import random
import struct

from tests.helpers.sqlite_logs import slow_checksum

PAGE = 512
FRAME = 24 + PAGE
HEADER = 32
_BIG = 0x377F0683


class AppLog:
    """`commits` says after which byte which state is whole."""

    def __init__(self, source: random.Random) -> None:
        self._salts = struct.pack(">2I", source.getrandbits(32), source.getrandbits(32))
        head = struct.pack(">4I", _BIG, 3_007_000, PAGE, 0) + self._salts
        self._sums = slow_checksum(head, "big", (0, 0))
        self.data = bytearray(head + struct.pack(">2I", *self._sums))
        self.commits: list[tuple[int, bytes]] = []

    def commit(self, before: bytes, after: bytes) -> None:
        """Frames of the pages that differ; at least the first has, as its counter goes up."""
        changed = [
            (at // PAGE + 1, after[at : at + PAGE])
            for at in range(0, len(after), PAGE)
            if before[at : at + PAGE] != after[at : at + PAGE]
        ]
        for number, (page_no, page) in enumerate(changed, 1):
            size = len(after) // PAGE if number == len(changed) else 0
            head = struct.pack(">2I", page_no, size)
            self._sums = slow_checksum(head + page, "big", self._sums)
            self.data += head + self._salts + struct.pack(">2I", *self._sums) + page
        self.commits.append((len(self.data), after))

    def whole_up_to(self, offset: int) -> tuple[int, bytes] | None:
        """The last commit that ends there or before."""
        whole = [one for one in self.commits if one[0] <= offset]
        return whole[-1] if whole else None


def changed_image(source: random.Random, before: bytes) -> bytes:
    """A transaction later: some pages other, seldom some more or fewer."""
    pages = [before[at : at + PAGE] for at in range(0, len(before), PAGE)]
    kind = source.random()
    if kind < 0.1 or not pages:
        pages += [source.randbytes(PAGE) for _ in range(source.randrange(1, 30))]
    elif kind < 0.15:
        del pages[source.randrange(1, len(pages) + 1) :]
    for _ in range(source.choice([1, 1, 2, 6])):
        pages[source.randrange(len(pages))] = source.randbytes(PAGE)
    return with_header(source, pages)


def new_image(source: random.Random) -> bytes:
    """Another database altogether."""
    pages = [source.randbytes(PAGE // 4) * 4 for _ in range(1 + source.randrange(300))]
    return with_header(source, pages)


def with_header(source: random.Random, pages: list[bytes]) -> bytes:
    """The first page as SQLite has it: size, page count, and a counter that goes up."""
    counter = source.randrange(1 << 31)
    head = bytearray(pages[0])
    head[:24] = b"SQLite format 3\0" + PAGE.to_bytes(2, "big") + bytes([2, 2, 0, 64, 32, 32])
    head[24:32] = counter.to_bytes(4, "big") + len(pages).to_bytes(4, "big")
    head[92:96] = counter.to_bytes(4, "big")
    return b"".join([bytes(head), *pages[1:]])
