"""Parts of an image side by side, against a transport that breaks off and changes state."""

import os
import re
from collections.abc import Callable

import httpx
import pytest

from app.client import BopClient, ProblemError, ServiceUnreachable, StreamBroken, UnexpectedAnswer
from app.client.images import Wanted
from app.replication import download as module
from app.replication.download import download
from tests.helpers.fake_clock import FakeClock

WANTED = Wanted(tenant="acme", database="main", generation=7)
MIB = 1024 * 1024
IMAGE = os.urandom(1000) * 4500  # 4.3 MiB


class NoWaiting(FakeClock):
    async def sleep(self, seconds):
        self.advance(seconds)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES_MIN", MIB)


class Breaking(httpx.SyncByteStream):
    def __init__(self, data, *, fails):
        self._data, self._fails = data, fails

    def __iter__(self):
        for at in range(0, len(self._data), 100_000):
            yield self._data[at : at + 100_000]
        if self._fails:
            raise httpx.ReadError("broke off")


class Service:
    """Holds one image; what goes wrong is set by a test."""

    def __init__(self, image=IMAGE):
        self.image, self.version = image, 1
        self.cuts: list[int | None] = []
        """For each GET in turn, where it breaks off; None: it does not."""
        self.breaks_off = True
        """Else it ends there, as if that were all."""
        self.after_head = self.after_get = lambda: None
        self.refusal: Callable[[], httpx.Response] | None = None
        self.ranges: list[str | None] = []
        self.changes: dict[str, str] = {}

    def __call__(self, request):
        assert dict(request.url.params) == {"generation": "7"}
        if self.refusal is not None:
            return self.refusal()
        etag = f'"{self.version}"'
        headers = {"ETag": etag, "Bop-Generation": "7", "Bop-Lsn": str(self.version)}
        if request.method == "HEAD":
            self.after_head()
            return httpx.Response(200, headers={**headers, "Content-Length": str(len(self.image))})
        assert request.headers["Accept-Encoding"] == "identity"
        self.ranges.append(request.headers.get("Range"))
        if request.headers.get("If-Match") not in {None, etag}:
            problem = {"code": "precondition_failed", "status": 412}
            kind = {"Content-Type": "application/problem+json"}
            return httpx.Response(412, json=problem, headers=kind)
        status, data = 200, self.image
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")):
            first, end = int(found[1]), int(found[2]) + 1
            status, data = 206, self.image[first:end]
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(self.image)}"
        headers |= {"Content-Length": str(len(data)), **self.changes}
        cut = self.cuts.pop(0) if self.cuts else None
        fails = cut is not None and self.breaks_off
        stream = Breaking(data if cut is None else data[:cut], fails=fails)
        self.after_get()
        return httpx.Response(status, headers=headers, stream=stream)


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def fetch(service, tmp_path):
    """Downloads, and gives state, content and what was told of progress."""

    async def run():
        told = []
        path = tmp_path / "file"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        clock = NoWaiting()
        client = BopClient("http://bop.test", transport=httpx.MockTransport(service), clock=clock)
        try:
            async with client, client.images.reading(WANTED) as reader:
                state = await download(reader, descriptor, lambda *each: told.append(each))
        finally:
            os.close(descriptor)
        return state, path.read_bytes(), told

    return run


async def test_parts_make_up_the_image(service, fetch):
    state, content, told = await fetch()
    assert content == IMAGE
    assert (state.generation, state.lsn, state.etag) == (7, 1, '"1"')
    assert sorted(service.ranges) == sorted(
        f"bytes={at}-{min(at + 2 * MIB, len(IMAGE)) - 1}" for at in range(0, len(IMAGE), 2 * MIB)
    )
    assert told[-1] == (len(IMAGE), len(IMAGE))


@pytest.mark.parametrize("size", [1, 1000, MIB, 4 * MIB, 4 * MIB + 1])
async def test_sizes(service, fetch, size):
    service.image = IMAGE[:size]
    _, content, _ = await fetch()
    assert content == IMAGE[:size]
    assert len(service.ranges) <= module.PARTS_MAX


async def test_an_empty_image_is_an_empty_file(service, fetch):
    service.image = b""
    state, content, _ = await fetch()
    assert (state.content_bytes, content) == (0, b"")


async def test_what_breaks_off_goes_on_there(service, fetch):
    service.cuts = [0, 350_000, None, 100_000]
    _, content, _ = await fetch()
    assert content == IMAGE
    assert len(service.ranges) == 3 + 3
    assert None not in service.ranges


async def test_a_connection_that_always_breaks_off_is_given_up(service, fetch):
    service.cuts = [0] * 100
    with pytest.raises(ServiceUnreachable, match="broke off"):
        await fetch()


async def test_a_service_that_is_restarted_is_waited_for(service, fetch):
    """First nobody listens, then it is not ready yet; it goes on where it broke."""
    service.image = IMAGE[:MIB]
    service.cuts = [400_000]
    not_ready = {"code": "not_ready", "status": 503, "title": "t", "detail": "d"}
    kind = {"Content-Type": "application/problem+json"}
    left = 30

    def refuse():
        nonlocal left
        left -= 1
        if left == 0:
            service.refusal = None
        if left > 10:
            raise httpx.ConnectError("refused")
        return httpx.Response(503, json=not_ready, headers=kind)

    def go_away():
        service.refusal, service.after_get = refuse, lambda: None

    service.after_get = go_away
    _, content, _ = await fetch()
    assert content == IMAGE[:MIB]
    assert service.ranges == [f"bytes={at}-{MIB - 1}" for at in (0, 400_000)]


async def test_answers_that_end_before_their_end_are_given_up(service, fetch):
    service.image = IMAGE[:1000]
    service.cuts, service.breaks_off = [0] * 100, False
    with pytest.raises(StreamBroken, match="before their end"):
        await fetch()
    assert len(service.ranges) == module.BROKEN_MAX


async def test_a_writer_that_is_too_quick_means_the_whole_at_once(service, fetch):
    def change():
        service.version += 1

    service.after_head = change
    state, content, _ = await fetch()
    assert (content, state.etag) == (IMAGE, '"2"')
    assert service.ranges[-1] is None
    service.ranges.clear()
    service.after_head, service.after_get = lambda: None, change  # some parts came
    state, content, _ = await fetch()
    assert content == IMAGE
    assert service.ranges[-1] is None


async def test_a_change_after_a_break_means_all_anew(service, fetch):
    """Parts of two states never meet in one file."""
    service.cuts = [None, 200_000, None]
    other = bytes(len(IMAGE) - 5)
    opened = 0

    def change_behind_the_last_part():
        nonlocal opened
        opened += 1
        if opened == 3:
            service.image, service.version = other, 2

    service.after_get = change_behind_the_last_part
    state, content, _ = await fetch()
    assert (state.etag, content == other) == ('"2"', True)


async def test_changes_after_every_break_are_given_up(service, fetch):
    service.image = IMAGE[:1000]
    service.cuts = [0] * 100

    def change():
        service.version += 1

    service.after_get = change
    with pytest.raises(StreamBroken, match="had changed"):
        await fetch()


@pytest.mark.parametrize(
    "changes",
    [
        {"ETag": '"9"'},
        {"Content-Range": "bytes 1-2/3"},
        {"Content-Encoding": "gzip"},
    ],
)
async def test_an_answer_of_something_else_is_refused(service, fetch, changes):
    service.changes = changes
    with pytest.raises(UnexpectedAnswer):
        await fetch()


async def test_a_state_without_a_strong_name_is_refused(service, fetch):
    headers = {"ETag": 'W/"1"', "Content-Length": "5"}
    service.refusal = lambda: httpx.Response(200, headers=headers)
    with pytest.raises(UnexpectedAnswer, match="strong ETag"):
        await fetch()


async def test_a_refusal_is_told_with_its_code(service, fetch):
    service.refusal = lambda: httpx.Response(
        404,
        json={"code": "database_not_found", "status": 404, "title": "t", "detail": "d"},
        headers={"Content-Type": "application/problem+json"},
    )
    with pytest.raises(ProblemError) as caught:
        await fetch()
    assert caught.value.code == "database_not_found"
