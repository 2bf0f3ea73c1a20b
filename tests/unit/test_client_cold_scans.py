"""The client's cold scans, against answers that break off."""

import random

import httpx
import pytest

from app.client import BopClient, ProblemError, RetryPolicy, StreamBroken
from app.client.cold_scans import ScanRequest
from app.client.scan_file import scan_to_file
from app.core.base.clock import SeededRandomness
from app.core.formats.cold_scan import Frame, FrameType, ScanEnd, ScanStart, note_frame
from tests.helpers.fake_clock import FakeClock

PAGE, PER_CHUNK, PAGES = 512, 4, 20
CONTENT = random.Random(3).randbytes(PAGE * PAGES)


class NoWaiting(FakeClock):
    async def sleep(self, seconds):
        self.advance(seconds)


class Scans:
    """Serves CONTENT in frames of two pages. `cuts` says after how many bytes each answer ends."""

    def __init__(self):
        self.cuts: list[int] = []
        self.errors: list[dict] = []
        self.asked: list[dict[str, str]] = []
        self.damage = 0

    def __call__(self, request):
        self.asked.append(dict(request.url.params))
        first = int(request.url.params.get("first_page", 1))
        frames = [
            Frame(
                type=FrameType.PAGES, chunk_id=(page - 1) // PER_CHUNK, first=page,
                count=2, payload=CONTENT[(page - 1) * PAGE : (page + 1) * PAGE],
            )
            for page in range(first, PAGES, 2)
        ]  # fmt: skip
        start = ScanStart(
            tenant="acme", database="db", engine="libsql", generation=7, page_size=PAGE, chunks=5
        )
        end = ScanEnd(
            frames=len(frames), bytes=sum(len(one.payload) for one in frames),
            chunks=len({one.chunk_id for one in frames}),
        )  # fmt: skip
        notes = note_frame(FrameType.START, start), note_frame(FrameType.END, end)
        if self.errors:
            frames, notes = frames[:3], (notes[0], note_frame(FrameType.ERROR, self.errors.pop(0)))
        body = b"".join(
            one.header() + bytes(one.payload) for one in (notes[0], *frames, notes[1])
        )  # fmt: skip
        if self.damage:
            self.damage -= 1
            body = body[:1000] + bytes([body[1000] ^ 1]) + body[1001:]
        return httpx.Response(200, stream=Cut(body, self.cuts.pop(0) if self.cuts else None))


class Cut(httpx.AsyncByteStream):
    def __init__(self, body, length):
        self.body, self.length = body, length

    async def __aiter__(self):
        for at in range(0, len(self.body), 100):
            if self.length is not None and at >= self.length:
                raise httpx.ReadError("cut")
            yield self.body[at : at + 100]


@pytest.fixture
def scans():
    return Scans()


@pytest.fixture
async def client(scans):
    async with BopClient(
        "http://bop.test", transport=httpx.MockTransport(scans), clock=NoWaiting(),
        randomness=SeededRandomness(7), retry=RetryPolicy(attempts_max=3),
    ) as client:  # fmt: skip
        yield client


ASKED = ScanRequest(tenant="acme", database="db", snapshot="s")


async def frames_of(client):
    return [frame async for frame in client.cold_scans.frames(ASKED)]


def content(frames):
    return b"".join(bytes(frame.payload) for frame in frames if frame.is_data)


async def test_a_scan_that_breaks_off_goes_on_behind_its_last_frame(client, scans):
    scans.cuts = [3000, 2000, 50, 5000]
    frames = await frames_of(client)
    assert content(frames) == CONTENT
    assert [frame.type for frame in frames] == [0, *[1] * 10, 3]
    assert frames[-1].end() == ScanEnd(frames=10, bytes=len(CONTENT), chunks=5)
    assert scans.asked[0] == {"tenant": "acme", "database": "db", "snapshot": "s"}
    assert all(asked["generation"] == "7" and "snapshot" not in asked for asked in scans.asked[1:])
    assert [int(asked.get("first_page", 1)) for asked in scans.asked] == sorted(
        int(asked.get("first_page", 1)) for asked in scans.asked
    )


async def test_damage_on_the_way_is_read_again(client, scans):
    scans.damage = 2
    assert content(await frames_of(client)) == CONTENT
    scans.damage = 10
    with pytest.raises(StreamBroken):
        await frames_of(client)


async def test_what_passes_is_waited_for_and_what_stays_is_told(client, scans):
    scans.errors = [{"code": "remote_unavailable", "status": 503, "title": "t", "detail": "d"}]
    assert content(await frames_of(client)) == CONTENT
    scans.errors = [
        {"code": "corrupt_blob", "status": 500, "title": "t", "detail": "gone", "key": "k"}
    ]
    with pytest.raises(ProblemError) as told:
        await frames_of(client)
    assert (told.value.code, told.value.extras) == ("corrupt_blob", {"key": "k"})


async def test_a_file_is_whole_or_not_there(client, scans, tmp_path):
    target, seen = tmp_path / "db.sqlite", []
    scans.cuts = [3000, 0, 0, 0, 0]

    async def run(**options):
        return await scan_to_file(
            client.cold_scans, ASKED, target,
            progress=lambda start, done, chunks: seen.append((done, chunks)), **options,
        )  # fmt: skip

    with pytest.raises(Exception, match="cut"):
        await run()
    assert list(tmp_path.iterdir()) == []
    scans.cuts = [3000]
    scanned = await run()
    assert target.read_bytes() == CONTENT
    assert (scanned.generation, scanned.bytes, scanned.chunks) == (7, len(CONTENT), 5)
    assert seen[-1] == (len(CONTENT), 5)
    with pytest.raises(FileExistsError):
        await run()
    await run(replace=True, form="frames")
    assert target.read_bytes().startswith(b"BOPF")
    assert [path.name for path in tmp_path.iterdir()] == ["db.sqlite"]
