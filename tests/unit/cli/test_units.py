from datetime import UTC, datetime

import pytest

from app.cli.demo_log import iter_log
from app.cli.units import (
    bytes_text,
    lsns_text,
    parse_bytes,
    plain_text,
    rate_text,
    seconds_text,
    time_text,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (64 << 20, "64.0 MiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_bytes(count, text):
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (1.25, "1.2 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")],
)
def test_seconds(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("text", "shown", "on_one_line"),
    [
        ("it hangs, größer 完 🙂", "it hangs, größer 完 🙂", "it hangs, größer 完 🙂"),
        ("two\nlines", "two\nlines", r"two\nlines"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x9b1m\u202ec", r"a\rb\x9b1m\u202ec", r"a\rb\x9b1m\u202ec"),
    ],
)
def test_what_a_terminal_would_obey_is_spelled_out(text, shown, on_one_line):
    assert plain_text(text) == shown
    assert plain_text(text, one_line=True) == on_one_line


def test_ranges_rates_and_times():
    assert lsns_text(1, 0) == "-"
    assert lsns_text(7, 7) == "7"
    assert lsns_text(1, 1000) == "1-1000"
    assert rate_text(2048, 2) == "1.0 KiB/s"
    assert rate_text(2048, 0) == "-"
    assert time_text(datetime(2026, 11, 23, 21, 5, tzinfo=UTC)) == "2026-11-23 21:05:00Z"
    assert time_text(None) == "-"


def test_the_demo_log_is_the_same_for_the_same_seed_and_lines_of_json():
    import json

    def whole(seed: int) -> bytes:
        return b"".join(
            batch.body for batch in iter_log(seed=seed, total_bytes=50_000, batch_bytes=9_000)
        )

    body = whole(1)
    assert body == whole(1) != whole(2)
    assert 50_000 <= len(body) < 51_000
    batches = list(iter_log(seed=1, total_bytes=50_000, batch_bytes=9_000))
    assert sum(batch.count for batch in batches) == body.count(b"\n")
    assert len(batches) == 6
    assert {"ts", "level", "msg"} <= set(json.loads(body.splitlines()[-1]))


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("12", 12), ("12B", 12), ("1.5 KiB", 1536), ("2gib", 2 << 30), ("9TiB", 9 << 40)],
)
def test_sizes_are_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "-1", "much", "1GB", "1.5.2KiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="no size"):
        parse_bytes(text)
