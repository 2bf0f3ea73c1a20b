"""The oracle: a plain model of an append_only database, small enough to be seen to be right."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChunk:
    chunk_id: int
    generation: int
    first_lsn: int
    last_lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGeneration:
    generation: int
    first_lsn: int
    last_lsn: int
    chunk_ids: tuple[int, ...]


@dataclass(slots=True)
class AppendOnlyModel:
    """`records` are the readable ones by LSN; LSNs only grow and are never reused (I14)."""

    records: dict[int, bytes] = field(default_factory=dict)
    chunks: list[ModelChunk] = field(default_factory=list)
    generations: list[ModelGeneration] = field(default_factory=list)
    first_lsn: int = 1
    next_lsn: int = 1
    checkpointed_lsn: int = 0
    _next_chunk_id: int = 0

    def append(self, payloads: Sequence[bytes]) -> tuple[int, int]:
        first = self.next_lsn
        for payload in payloads:
            self.records[self.next_lsn] = payload
            self.next_lsn += 1
        return first, self.next_lsn - 1

    def read(self, from_lsn: int, to_lsn: int | None = None) -> list[tuple[int, bytes]]:
        """Up to the first gap, as the service answers."""
        found: list[tuple[int, bytes]] = []
        for lsn, payload in sorted(self.records.items()):
            if lsn < from_lsn or (to_lsn is not None and lsn > to_lsn):
                continue
            if found and lsn != found[-1][0] + 1:
                break
            found.append((lsn, payload))
        return found

    def checkpoint(self, segment_last_lsns: Sequence[int] = ()) -> ModelGeneration | None:
        """Publishes all there is, a chunk per segment (one, where no ends are given).

        None: nothing new, no generation.
        """
        last = self.next_lsn - 1
        if last <= self.checkpointed_lsn:
            return None
        generation = len(self.generations) + 1
        first = covered = self.checkpointed_lsn + 1
        for end in segment_last_lsns or (last,):
            self.chunks.append(
                ModelChunk(
                    chunk_id=self._next_chunk_id,
                    generation=generation,
                    first_lsn=covered,
                    last_lsn=end,
                )
            )
            self._next_chunk_id += 1
            covered = end + 1
        published = ModelGeneration(
            generation=generation,
            first_lsn=first,
            last_lsn=last,
            chunk_ids=tuple(chunk.chunk_id for chunk in self.chunks),
        )
        self.generations.append(published)
        self.checkpointed_lsn = last
        return published

    def truncate_head(self, lsn: int) -> int:
        """Drops the chunks that end below `lsn`; gives where reading now starts."""
        for chunk in [chunk for chunk in self.chunks if chunk.last_lsn < lsn]:
            self.chunks.remove(chunk)
            self.first_lsn = chunk.last_lsn + 1
        self.records = {at: data for at, data in self.records.items() if at >= self.first_lsn}
        return self.first_lsn

    def truncate_tail(self, lsn: int) -> tuple[int, int] | None:
        """Drops the records from `lsn` on; their LSNs stay unused."""
        dropped = [at for at in self.records if at >= lsn]
        for at in dropped:
            del self.records[at]
        return (min(dropped), max(dropped)) if dropped else None
