"""Which generations a database keeps: pure.

A generation is kept while it is one of the newest `keep_generations`, while it was superseded less
than `keep_seconds` ago, while a snapshot pins it, or while it is one of the newest
`minimum_generations`. Time counts from when it was superseded, not from when it was made: one that
is days old may have been the newest state an hour ago.

This decides what the collector takes next. What can be read is decided by the manifest alone: a
generation stays readable until its row is gone.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from app.core.stores.manifest.records import GenerationRecord, Retention


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionRule:
    """A policy at one moment, for one database whose newest generation is `newest`."""

    retention: Retention
    newest: int
    pinned: Collection[int]
    now_us: int
    """The collector's time, which only advances."""

    def keeps(self, record: GenerationRecord) -> bool:
        behind = self.newest - record.generation
        if behind < max(self.retention.minimum_generations, 1):
            return True
        if record.generation in self.pinned:
            return True
        keep_generations = self.retention.keep_generations
        if keep_generations is not None and behind < keep_generations:
            return True
        if record.superseded_at_us is None:
            return True
        keep_seconds = self.retention.keep_seconds
        return (
            keep_seconds is not None
            and self.now_us < record.superseded_at_us + keep_seconds * 1_000_000
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    kept: tuple[GenerationRecord, ...]
    expiring: tuple[GenerationRecord, ...]
    """What the next collection takes."""


def judge(generations: Iterable[GenerationRecord], rule: RetentionRule) -> Judgement:
    """`generations` ascending, as the manifest has them."""
    kept: list[GenerationRecord] = []
    expiring: list[GenerationRecord] = []
    for record in generations:
        (kept if rule.keeps(record) else expiring).append(record)
    return Judgement(kept=tuple(kept), expiring=tuple(expiring))
