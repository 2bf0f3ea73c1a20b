import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.routers.ranges import ByteRange, decide, parse_range

SIZE = 1000
TAG = '"7-42"'


def span(first, stop, size=SIZE):
    return ByteRange(first=first, stop=stop, size=size)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("bytes=0-0", span(0, 1)),
        ("bytes=0-999", span(0, 1000)),
        ("bytes=10-19", span(10, 20)),
        ("bytes=990-", span(990, 1000)),
        ("bytes=-1", span(999, 1000)),
        ("bytes=-5000", span(0, 1000)),
        ("bytes=10-5000", span(10, 1000)),
        ("bytes=0-99999999999999999999999999", span(0, 1000)),
        ("BYTES=1-2", span(1, 3)),
        (" bytes = 1-2 ", span(1, 3)),
        ("bytes=00000000000000000000000001-2", span(1, 3)),
        ("bytes=1000-", "unsatisfiable"),
        ("bytes=1000-1001", "unsatisfiable"),
        ("bytes=99999999999999999999999999-", "unsatisfiable"),
        ("bytes=-0", "unsatisfiable"),
        # several ranges, other units, and what is no range: the whole is sent
        ("bytes=0-1,5-6", None),
        ("bytes=0-1, -1", None),
        ("items=0-1", None),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=", None),
        ("bytes=a-b", None),
        ("bytes=1-2x", None),
        ("bytes=+1-2", None),
        ("bytes=-1-2", None),
        ("bytes=\u0661-\u0662", None),
        ("", None),
        (None, None),
    ],
)
def test_ranges(header, wanted):
    assert parse_range(header, size=SIZE) == wanted


def test_nothing_of_nothing():
    assert parse_range("bytes=0-", size=0) == "unsatisfiable"
    assert parse_range("bytes=-1", size=0) == "unsatisfiable"
    assert parse_range(None, size=0) is None


@given(first=st.integers(0, 60), last=st.integers(0, 60), size=st.integers(0, 50))
def test_a_range_is_what_slicing_gives(first, last, size):
    content = bytes(range(size))
    found = parse_range(f"bytes={first}-{last}", size=size)
    wanted = content[first : last + 1]
    if isinstance(found, ByteRange):
        assert content[found.first : found.stop] == wanted
        assert found.length == len(wanted)
        assert found.content_range == f"bytes {first}-{first + len(wanted) - 1}/{size}"
    elif found == "unsatisfiable":
        assert first >= size
    else:
        assert last < first


@given(st.text(max_size=30))
def test_any_text_is_survived(text):
    found = parse_range(text, size=SIZE)
    assert found in {None, "unsatisfiable"} or 0 <= found.first < found.stop <= SIZE
    asked(if_match=text, if_none_match=text, if_range=text)


def asked(method="GET", **headers):
    names = {"if_match": None, "if_none_match": None, "if_range": None, "range_header": None}
    return decide(etag=TAG, size=SIZE, method=method, **{**names, **headers})


@pytest.mark.parametrize("given_tag", ['"7-42"', "*", '"x", "7-42"', '"x",,"7-42" ,', ' "7-42" '])
def test_if_match_holds(given_tag):
    assert asked(if_match=given_tag) == "whole"
    assert asked(if_match=given_tag, range_header="bytes=1-1") == span(1, 2)
    assert asked(if_none_match=given_tag) == "not_modified"


@pytest.mark.parametrize("given_tag", ['"7-43"', "7-42", "", '"x" "7-42"', '"7-42', 'x"7-42"'])
def test_if_match_does_not_hold(given_tag):
    assert asked(if_match=given_tag) == "precondition_failed"
    assert asked(if_match=given_tag, method="HEAD") == "precondition_failed"
    assert asked(if_none_match=given_tag) == "whole"


def test_a_weak_tag_is_no_proof_of_the_same_bytes():
    assert asked(if_match='W/"7-42"') == "precondition_failed"
    assert asked(if_none_match='W/"7-42"') == "not_modified"
    assert asked(if_range='W/"7-42"', range_header="bytes=1-1") == "whole"


def test_if_range_sends_the_whole_of_another_state():
    assert asked(if_range=TAG, range_header="bytes=1-1") == span(1, 2)
    assert asked(if_range='"7-41"', range_header="bytes=1-1") == "whole"
    assert asked(if_range="Tue, 24 Nov 2026 00:00:00 GMT", range_header="bytes=1-1") == "whole"
    assert asked(if_range='"7-41"', range_header="bytes=5000-") == "whole"


def test_ranges_are_for_get():
    assert asked(method="HEAD", range_header="bytes=1-1") == "whole"
    assert asked(range_header="bytes=5000-") == "unsatisfiable"


def test_the_order_of_preconditions():
    assert asked(if_match='"x"', if_none_match=TAG) == "precondition_failed"
    assert asked(if_match=TAG, if_none_match=TAG, range_header="bytes=1-1") == "not_modified"
