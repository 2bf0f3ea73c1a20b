"""What those share who use the service: when they work and when they sleep, what they made, and
what of the failures around them they must bear.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

from app.core.base.errors import Backpressure, CorruptBlob, DiskFull, QuotaExhausted
from tests.simulation.bucket import Bucket, Violation
from tests.simulation.content import Content, Database, Ledger, Picture
from tests.simulation.life import Life

REFUSED = (Backpressure, QuotaExhausted, DiskFull)
"""Nothing was kept; it may be tried again."""
DAY_SECONDS, NIGHT_SECONDS = 100.0, 16 * 3600.0


@dataclass
class Crowd:
    source: random.Random
    bucket: Bucket
    ledgers: list[Ledger]
    pictures: list[Picture]
    done: "Counter[str]" = field(default_factory=Counter)
    forks: dict[str, tuple[Database, Content]] = field(default_factory=dict)
    """Their names, whose they are, and what they first read as."""
    snapshots: set[tuple[str, str, str]] = field(default_factory=set)
    life: Life | None = None
    _names: int = 0
    _dusk: float = 0.0
    _dawn: float = 0.0

    @property
    def databases(self) -> list[Database]:
        return [*self.ledgers, *self.pictures]

    def is_dead(self) -> bool:
        """Killed: what is told from now on, nobody hears."""
        assert self.life is not None
        return self.life.dead

    def new_name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"

    async def pause(self) -> None:
        """A while of the day; from dusk on to the next morning, which all see at once."""
        mean = self.source.choices([2.0, 20.0, 120.0], [70, 25, 5])[0]
        await asyncio.sleep(self.source.expovariate(1 / mean))
        now = asyncio.get_running_loop().time()
        if self._dusk <= now < self._dawn:
            await asyncio.sleep(self._dawn - now)
        elif now >= self._dawn:
            self._dusk = now + self.source.expovariate(1 / DAY_SECONDS)
            self._dawn = self._dusk + self.source.expovariate(1 / NIGHT_SECONDS)

    def bear(self, error: CorruptBlob) -> None:
        """Bits flip on the way and are noticed; an object that a reader needs never goes."""
        key = error.fields.get("key")
        if self.bucket.healthy:
            raise error
        if isinstance(key, str) and key not in self.bucket.objects and not self.is_dead():
            raise Violation(f"{key} is gone, and somebody reads it") from error

    def must_not_be_told(self, what: str, *, begun_after_failure: bool) -> None:
        """Of what was asked for after the disk under the WAL had failed, nothing is (I16)."""
        if begun_after_failure and not self.is_dead():
            raise Violation(f"{what} was acknowledged after the disk had failed")

    def wal_has_failed(self) -> bool:
        assert self.life is not None
        return self.life.disk.failed == "wal"
