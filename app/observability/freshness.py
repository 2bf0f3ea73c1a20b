"""How far the remote store is behind, at scrape time: in all, and for single databases as far as
their number is bounded.
"""

from collections.abc import Iterable, Sequence

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from app.core.services.freshness import DatabaseFreshness

LABELS = ("tenant", "database")


class FreshnessCollector(Collector):
    """Shows what it was given last. Labels go to the oldest databases, so that a series does not
    come and go with every scrape.
    """

    def __init__(self, *, databases_max: int) -> None:
        self._databases_max = databases_max
        self._seen: Sequence[DatabaseFreshness] = ()

    def show(self, seen: Sequence[DatabaseFreshness]) -> None:
        self._seen = seen

    def collect(self) -> Iterable[GaugeMetricFamily]:
        seen = self._seen
        yield GaugeMetricFamily(
            "remote_position_age_max_seconds",
            "The highest age of any database's newest position that the bucket alone restores.",
            value=max((one.remote_age_seconds for one in seen), default=0.0),
        )
        yield GaugeMetricFamily(
            "unpublished_wal_age_max_seconds",
            "The same, of databases that hold WAL beyond that position.",
            value=max((one.unpublished_age_seconds for one in seen), default=0.0),
        )
        yield GaugeMetricFamily(
            "unpublished_wal_total_bytes",
            "WAL that would be lost with this disk.",
            value=float(sum(one.unpublished_bytes for one in seen)),
        )
        yield GaugeMetricFamily(
            "databases_unhealthy",
            "Databases with damaged or lost WAL, or a generation that failed verification.",
            value=float(sum(not one.healthy for one in seen)),
        )
        yield GaugeMetricFamily("databases", "Databases that live here.", value=float(len(seen)))
        yield from self._by_database(seen[: self._databases_max])

    def _by_database(self, shown: Sequence[DatabaseFreshness]) -> Iterable[GaugeMetricFamily]:
        age = GaugeMetricFamily(
            "remote_position_age_seconds",
            "Age of the newest position that the bucket alone restores.",
            labels=LABELS,
        )
        unpublished_age = GaugeMetricFamily(
            "unpublished_wal_age_seconds",
            "The same while there is WAL beyond it; 0 while the bucket has everything.",
            labels=LABELS,
        )
        unpublished = GaugeMetricFamily(
            "unpublished_wal_bytes", "WAL that would be lost with this disk.", labels=LABELS
        )
        for one in shown:
            labels = (one.tenant, one.database)
            age.add_metric(labels, one.remote_age_seconds)
            unpublished_age.add_metric(labels, one.unpublished_age_seconds)
            unpublished.add_metric(labels, float(one.unpublished_bytes))
        yield from (age, unpublished_age, unpublished)
