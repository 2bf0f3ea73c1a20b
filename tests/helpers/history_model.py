"""The oracle of the history machine: what each database, generation, snapshot and fork must hold.

Plain dictionaries and bytes. It knows nothing of chunks, blobs, WAL or rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Records = Mapping[int, bytes]
Engine = Literal["append_only", "libsql"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationModel:
    """What a generation holds, for ever: records by LSN, or a database file (None: no page yet)."""

    records: Records = field(default_factory=dict)
    image: bytes | None = None


@dataclass(slots=True, kw_only=True)
class RetentionModel:
    keeps_all: bool = True
    """By time: the tests live for less than a day."""
    keep_generations: int | None = None
    minimum_generations: int = 2

    def keeps(self, *, behind: int) -> bool:
        return (
            self.keeps_all
            or behind < max(self.minimum_generations, 1)
            or (self.keep_generations is not None and behind < self.keep_generations)
        )


@dataclass(slots=True, kw_only=True)
class DatabaseModel:
    name: str
    engine: Engine
    records: dict[int, bytes] = field(default_factory=dict)
    image: bytes | None = None
    next_lsn: int = 1
    first_lsn: int = 1
    generations: dict[int, GenerationModel] = field(default_factory=dict)
    """The readable ones; the newest number is the database's generation."""
    snapshots: dict[str, int] = field(default_factory=dict)
    retention: RetentionModel = field(default_factory=RetentionModel)
    doubtful: set[int] = field(default_factory=set)
    """Generations that no rule kept at some time: the collector, which also runs by itself, may
    have taken them, even if a later rule would keep them.
    """

    @property
    def newest(self) -> int:
        return max(self.generations, default=0)

    def append(self, payloads: list[bytes], *, first_lsn: int) -> None:
        assert first_lsn >= self.next_lsn, "an LSN was given out again"
        for lsn, payload in enumerate(payloads, start=first_lsn):
            self.records[lsn] = payload
        self.next_lsn = first_lsn + len(payloads)

    def publish(self, generation: int) -> None:
        """A checkpoint: all that was acknowledged."""
        assert generation > self.newest, "generations only grow"
        self.generations[generation] = GenerationModel(records=dict(self.records), image=self.image)
        self.doubt()

    def publish_unchanged(self, generation: int) -> None:
        """Chunks were merged: nothing that can be read has changed."""
        assert generation == self.newest + 1
        self.generations[generation] = self.generations[self.newest]
        self.doubt()

    def truncate(
        self, generation: int, *, first_lsn: int | None = None, tail: range | None = None
    ) -> None:
        """Drops what lies below `first_lsn`, or in `tail`; earlier generations stay."""

        def stays(lsn: int) -> bool:
            return not (
                (first_lsn is not None and lsn < first_lsn) or (tail is not None and lsn in tail)
            )

        before = self.generations[self.newest].records if self.generations else {}
        assert generation > self.newest
        self.generations[generation] = GenerationModel(
            records={lsn: data for lsn, data in before.items() if stays(lsn)}
        )
        self.records = {lsn: data for lsn, data in self.records.items() if stays(lsn)}
        if first_lsn is not None:
            self.first_lsn = max(self.first_lsn, first_lsn)
        self.doubt()

    @property
    def kept(self) -> list[int]:
        """What a rule or a snapshot keeps; others may be collected at any time."""
        pinned = set(self.snapshots.values())
        return [
            number
            for number in sorted(self.generations)
            if number in pinned or self.retention.keeps(behind=self.newest - number)
        ]

    @property
    def certain(self) -> list[int]:
        return [number for number in self.kept if number not in self.doubtful]

    def doubt(self) -> None:
        """To be called after every change of what rules and snapshots keep."""
        self.doubtful |= self.generations.keys() - set(self.kept)

    def collect(self, there: set[int]) -> None:
        """After a collection, `there` are the generations that the service has."""
        assert set(self.certain) <= there <= set(self.kept), (self.name, there)
        self.generations = {number: self.generations[number] for number in sorted(there)}

    def fork(
        self, name: str, generation: int, *, next_lsn: int, first_lsn: int, own: int
    ) -> "DatabaseModel":
        """`own` is the number that the fork gives its first generation."""
        held = self.generations[generation]
        return DatabaseModel(
            name=name,
            engine=self.engine,
            records=dict(held.records),
            image=held.image,
            next_lsn=next_lsn,
            first_lsn=first_lsn,
            generations={own: held},
        )
