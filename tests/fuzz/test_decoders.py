"""Hostile bytes (fault row 51): a decoder refuses in the way it says, or takes them, and its memory
stays bounded. Mutations of what was really written, most of them with their checksums made right
again, and bytes at random.
"""

import os
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Target

EXAMPLES = 80 * int(os.environ.get("BOP_FUZZ_TIMES", "1"))
TIMES_MAX = 64
NUMBERS = (0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Edit = tuple[str, float, int, int]
edits = st.lists(
    st.tuples(
        st.sampled_from(("flip", "set1", "set4", "set8", "cut", "insert", "drop", "repeat")),
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(NUMBERS) | st.integers(0, 2**32 - 1),
        st.integers(1, 64),
    ),
    max_size=6,
)


def edited(data: bytes, changes: list[Edit]) -> bytearray:
    found = bytearray(data)
    for kind, where, number, length in changes:
        at = int(where * (len(found) + 1))
        match kind:
            case "flip" if at < len(found):
                found[at] ^= 1 << number % 8
            case "set1" if at < len(found):
                found[at] = number % 256
            case "set4" if at + 4 <= len(found):
                found[at : at + 4] = number.to_bytes(4, "little" if length % 2 else "big")
            case "set8" if at + 8 <= len(found):
                found[at : at + 8] = (number << 32 | number).to_bytes(8, "little")
            case "cut":
                del found[at:]
            case "insert":
                found[at:at] = number.to_bytes(4, "big") * (length // 4)
            case "drop":
                del found[at : at + length]
            case "repeat":
                found[at:at] = found[at : at + length]
    return found


@pytest.fixture(scope="module", autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def check(target: Target, data: bytes) -> bool:
    """Whether it was taken."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        target.decode(data)
        taken = True
    except target.errors:
        taken = False
    peak = tracemalloc.get_traced_memory()[1] - before
    assert peak <= target.bytes_max + TIMES_MAX * len(data), f"{peak} bytes for {len(data)}"
    return taken


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_written_is_taken_or_refused(name: str) -> None:
    """Also holds that a target can be reached at all: some sample is taken."""
    target = TARGETS[name]
    taken = [check(target, sample) for sample in target.samples]
    assert any(taken)


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_bytes_are_refused_as_documented(name: str) -> None:
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(st.sampled_from(range(len(target.samples))), edits, st.booleans())
    def run(sample: int, changes: list[Edit], mended: bool) -> None:
        data = edited(target.samples[sample], changes)
        if mended and target.mend is not None:
            target.mend(data)
        check(target, bytes(data))

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_random_bytes_are_refused_as_documented(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES // 5, deadline=None, database=None, derandomize=True)
    @given(st.binary(max_size=400))
    def run(data: bytes) -> None:
        check(target, data)

    run()
