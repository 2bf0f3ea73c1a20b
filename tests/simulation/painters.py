"""An application with a SQLite database: it sends its log's frames as they stand, torn and damaged
ones too, or a whole image, and reads back what it was told is stored.
"""

import asyncio

from app.container.service import Container
from app.core.base.errors import CorruptBlob, Unavailable, WalGap, WalInvalid
from app.core.services.databases import DatabaseSpec
from app.core.services.pages_in import WalStored
from app.routers.raw_bodies import HeldBody
from tests.simulation.app_log import FRAME, HEADER, PAGE, AppLog, changed_image, new_image
from tests.simulation.bucket import Violation
from tests.simulation.content import Picture, read_image
from tests.simulation.crowd import REFUSED, Crowd
from tests.simulation.writers import CHUNK_BYTES

LOG_BYTES = 60_000
"""A log that is longer begins anew once all of it is stored."""


class Painter:
    def __init__(self, crowd: Crowd, container: Container, picture: Picture) -> None:
        self._crowd = crowd
        self._source = crowd.source
        self._services = container.services
        self._container = container
        self._picture = picture

    async def run(self) -> None:
        """For ever."""
        await self.settle()
        steps = [self._commit, self.put_image, self._gap, self._damage, self._read]
        while True:
            await self._crowd.pause()
            await self._source.choices(steps, [60, 12, 5, 5, 18])[0]()

    async def settle(self) -> None:
        """Finds out what became of the call that was not answered: frames by sending them again,
        an image by reading.
        """
        picture = self._picture
        while not picture.made:
            spec = DatabaseSpec(engine="libsql", page_size=PAGE, chunk_bytes=CHUNK_BYTES)
            try:
                await self._services.databases.create(picture.tenant, picture.name, spec)
            except REFUSED:
                await asyncio.sleep(60)
                continue
            picture.made = True
        while len(picture.images) > 1:
            if picture.unanswered is not None:
                body, offset, end, after_lsn = picture.unanswered
                try:
                    stored = await self._send(body, offset=offset, after_lsn=after_lsn)
                except REFUSED:
                    await asyncio.sleep(60)
                    continue
                if self._crowd.is_dead():
                    return
                self._took(stored, end)
            elif (found := await self._whole()) is None:
                await asyncio.sleep(60)
            else:
                picture.check(found)
                picture.app, picture.log = found, None
                picture.settle(found)
        status = self._services.databases.get(picture.tenant, picture.name)
        picture.last_lsn = status.next_lsn - 1

    # --- frames

    async def _commit(self) -> None:
        """A few transactions, and the log from where it is stored, often cut somewhere."""
        picture, source, crowd = self._picture, self._source, self._crowd
        all_stored = picture.log is None or picture.accepted == len(picture.log.data)
        if all_stored and (picture.log is None or len(picture.log.data) > LOG_BYTES):
            picture.log, picture.accepted = AppLog(source), 0
        log = picture.log
        assert log is not None
        for _ in range(source.choice([1, 1, 2, 4])):
            after = changed_image(source, picture.app)
            log.commit(picture.app, after)
            picture.app = after
        offset, cut = picture.accepted, len(log.data)
        if source.random() < 0.2:
            cut = source.randint(offset, cut)
        whole = log.whole_up_to(cut)
        end = max(whole[0] if whole else 0, offset)
        body = bytes(log.data[offset:cut])
        late = crowd.wal_has_failed()
        is_new = whole is not None and whole[0] > offset
        after_lsn = picture.last_lsn if offset == 0 else None
        if is_new and whole is not None:
            picture.hope(whole[1])
            picture.unanswered = body, offset, end, after_lsn
        try:
            stored = await self._send(body, offset=offset, after_lsn=after_lsn)
        except REFUSED:
            if is_new and not crowd.is_dead():
                picture.images.pop()
                picture.unanswered = None
            crowd.done["frames refused"] += 1
            return
        if crowd.is_dead():
            return
        crowd.must_not_be_told("a log", begun_after_failure=late and is_new)
        self._took(stored, end)
        crowd.done["frames"] += stored.frames

    def _took(self, stored: WalStored, end: int) -> None:
        picture = self._picture
        if stored.accepted_offset != end:
            raise Violation(
                f"of {picture.name}'s log {stored.accepted_offset} bytes are stored, not {end}"
            )
        picture.accepted = end
        picture.last_lsn = stored.last_lsn or picture.last_lsn
        picture.settle(picture.images[-1])

    async def _send(self, body: bytes, *, offset: int, after_lsn: int | None) -> WalStored:
        return await self._services.pages_in.append_wal(
            self._picture.tenant, self._picture.name, HeldBody(bytearray(body)),
            offset=offset, after_lsn=after_lsn,
        )  # fmt: skip

    async def _gap(self) -> None:
        """Frames that continue nothing."""
        picture = self._picture
        if picture.log is None or picture.accepted < HEADER:
            return
        log = AppLog(self._source)
        log.commit(b"", changed_image(self._source, b""))
        body = bytes(log.data[HEADER:])
        try:
            await self._send(body, offset=picture.accepted + 2 * FRAME, after_lsn=None)
        except (WalGap, *REFUSED):
            self._crowd.done["gap"] += 1
        else:
            raise Violation(f"frames of another log were taken by {picture.name}")

    async def _damage(self) -> None:
        """A bit of a page is other than its checksum says, and commits follow."""
        picture = self._picture
        log, offset = picture.log, picture.accepted
        if log is None or offset < HEADER or len(log.data) < offset + 2 * FRAME:
            return
        body = bytearray(log.data[offset:])
        body[24 + self._source.randrange(PAGE)] ^= 0x40
        try:
            stored = await self._send(bytes(body), offset=offset, after_lsn=None)
        except (WalGap, WalInvalid, *REFUSED):
            self._crowd.done["damaged frames"] += 1
            return
        if stored.accepted_offset != offset and not self._crowd.is_dead():
            raise Violation(f"damaged frames were taken by {picture.name}")

    # --- images

    async def put_image(self) -> None:
        picture, crowd = self._picture, self._crowd
        before = picture.app
        new = self._source.random() < 0.3
        image = new_image(self._source) if new else changed_image(self._source, before)
        late = crowd.wal_has_failed()
        picture.hope(image)
        try:
            put = await self._services.pages_in.put_image(
                picture.tenant, picture.name, HeldBody(bytearray(image)), place=None
            )
        except (Unavailable, *REFUSED):
            if not crowd.is_dead():
                picture.images.pop()
            return
        except CorruptBlob as error:
            crowd.bear(error)
            if not crowd.is_dead():
                picture.images.pop()
            return
        if crowd.is_dead():
            return
        crowd.must_not_be_told("an image", begun_after_failure=late)
        picture.app, picture.log, picture.last_lsn = image, None, put.lsn
        picture.settle(image)
        crowd.done["image"] += 1

    async def _read(self) -> None:
        found = await self._whole()
        if found is not None and not self._crowd.is_dead():
            self._picture.check(found)
            self._crowd.done["image read"] += 1

    async def _whole(self) -> bytes | None:
        """None, where the bucket stands in the way."""
        try:
            return await read_image(self._container, self._picture.tenant, self._picture.name)
        except Unavailable:
            return None
        except CorruptBlob as error:
            self._crowd.bear(error)
            return None
