"""Metrics: events in, Prometheus out, under the plan's names.

Label sets are made at the start, so that a counter that has seen nothing shows zero. Tenants are
never labels: their number is not bounded.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from app.core.base.clock import Clock, SystemClock
from app.core.base.events import Level, context_fields
from app.observability.freshness import FreshnessCollector
from app.observability.success_rate import SuccessRate

TIERS = ("wal", "page_cache", "local", "remote")
CHECKPOINT_OUTCOMES = ("published", "no_changes", "failed", "cancelled")
REMOTE_OPS = (
    "put_blob",
    "get_blob",
    "head_blob",
    "delete_blobs",
    "list_blobs",
    "put_if_absent",
    "put_if_match",
)
REMOTE_OUTCOMES = ("ok", "error", "cancelled")
VERIFICATION_OUTCOMES = ("ok", "repaired", "damaged", "missing")
READ_MODES = ("normal", "cold")
PARTS = ("remote", "manifest")
"""Of the service, that may fail while the rest goes on."""

_FAST_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_SLOW_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
_HTTP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
_BYTES_PER_SECOND = (1e5, 1e6, 5e6, 1e7, 2.5e7, 5e7, 1e8, 2.5e8, 5e8, 1e9, 2e9)
_CHAIN = (0, 1, 2, 3, 4, 6, 8, 12)
_SIZES = tuple(float(1 << power) for power in range(10, 31, 2))
_RATIO = (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 5, 10, 25, 50, 100)

Fields = Mapping[str, object]


class Metrics:
    """One registry: events come by `sink`, answers by `on_answer`, gauges by `watch`."""

    def __init__(self, *, databases_max: int = 0, clock: Clock | None = None) -> None:
        """`databases_max` databases get series of their own."""
        self._success_rate = SuccessRate(clock or SystemClock())
        self.registry = CollectorRegistry()
        self.freshness = FreshnessCollector(databases_max=databases_max)
        self.registry.register(self.freshness)
        self._http_children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._catalogue()
        self._handlers: Mapping[str, Callable[[Fields], None]] = {
            "checkpoint.completed": self._on_checkpoint_completed,
            "checkpoint.published": self._on_checkpoint_published,
            "checkpoint.unchanged": lambda fields: self._on_job_ended("no_changes", fields),
            "job.failed": lambda fields: self._on_job_ended("failed", fields),
            "job.cancelled": lambda fields: self._on_job_ended("cancelled", fields),
            "job.retrying": self._on_job_retrying,
            "quota.exhausted": lambda _: self.storage_quota_exhausted_total.inc(),
            "read.served": self._on_read_served,
            "remote.requested": self._on_remote_requested,
            "remote.throttled": lambda _: self.remote_throttled_total.inc(),
            "job.enqueued": lambda _: self.jobs_enqueued_total.inc(),
            "admin.acted": lambda fields: self.admin_actions_total.labels(
                str(fields["outcome"])
            ).inc(),
            "verification.checked": self._on_blob_verified,
            "cold_scan.measured": self._on_cold_scan_measured,
            "cold_scan.paused": lambda _: self.cold_scan_pauses_total.inc(),
            "collection.expired": self._on_expired,
            "collection.collected": self._on_collected,
            "collection.failed": lambda _: self.gc_failures_total.inc(),
            "collection.paused": lambda _: self.gc_pauses_total.inc(),
            "manifest.committed": self._on_manifest_committed,
            "manifest.map_full": lambda _: self.manifest_write_errors_total.inc(),
            "manifest.disk_full": lambda _: self.manifest_write_errors_total.inc(),
            "manifest.failed": lambda _: self.manifest_write_errors_total.inc(),
            "wal.flushed": self._on_wal_flushed,
        }

    def sink(self, name: str, level: Level, fields: Fields) -> None:
        """A sink for Events. An event that is no metric costs one look-up."""
        del level
        handler = self._handlers.get(name)
        if handler is not None:
            handler(fields)

    def watch(self, gauges: Mapping[str, Callable[[], float]]) -> None:
        """Gauges, by metric name (and label, behind a dot), that are read at scrape time. Raises
        KeyError for a name that this page does not know.
        """
        for name, read in gauges.items():
            self._gauges[name].set_function(read)

    def watch_connections(self, count: Callable[[], float]) -> None:
        """For as long as the process has a server."""
        self.http_connections.set_function(count)

    def unwatch(self) -> None:
        """What the callbacks read is being closed: the gauges show zero."""
        for gauge in self._gauges.values():
            gauge.set_function(_zero)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The scrape's body and media type: OpenMetrics where asked for, text otherwise."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type

    def on_answer(self, *, method: str, template: str, status: int, seconds: float) -> None:
        """One answered request. `template` is the route's, never the path: paths hold names."""
        key = (method, template, status)
        children = self._http_children.get(key)
        if children is None:
            children = self._http_children[key] = (
                self.http_requests_total.labels(method, template, str(status)),
                self.http_request_duration_seconds.labels(method, template),
            )
        children[0].inc()
        children[1].observe(seconds, exemplar())

    def on_cached_page(self, *, seconds: float, size_bytes: int) -> None:
        """A page that was answered from memory. Called, not told as an event: that would cost a
        hot page three times as much (0.9 µs against 3.4 µs of its 110 µs).
        """
        self._cached_pages[0].observe(seconds)
        self._cached_pages[1].inc(size_bytes)

    # --- what there is ------------------------------------------------------------------------

    def _catalogue(self) -> None:
        self.checkpoint_duration_seconds = self._histogram(
            "checkpoint_duration_seconds",
            "From a checkpoint's start to its completion.",
            _SLOW_SECONDS,
        )
        self.checkpoints_total = self._counter(
            "checkpoints_total", "Checkpoint jobs that ended.", ("outcome",), CHECKPOINT_OUTCOMES
        )
        Gauge(
            "checkpoint_success_rate",
            "Of the checkpoints that ended within the last hour, those that did not fail.",
            registry=self.registry,
        ).set_function(self._success_rate.value)
        self.checkpoint_bytes_uploaded_total = self._counter(
            "checkpoint_bytes_uploaded_total", "Bytes that published checkpoints uploaded."
        )
        self.job_retries_total = self._counter(
            "job_retries_total", "Attempts of jobs that failed and are tried again."
        )
        self.write_amplification = self._histogram(
            "write_amplification", "Bytes uploaded per byte dirtied, by checkpoint.", _RATIO
        )
        self.delta_chain_length = self._histogram(
            "delta_chain_length", "Deltas over the base of a chunk after a checkpoint.", _CHAIN
        )
        self.chunk_bytes = self._histogram(
            "chunk_bytes", "Size of the blobs that were published, by chunk.", _SIZES
        )
        self.coalesced_chunks_total = self._counter(
            "coalesced_chunks_total", "Small append-only chunks that were merged into larger ones."
        )
        self.coalesced_bytes_total = self._counter(
            "coalesced_bytes_total", "Bytes that merging small chunks uploaded again."
        )
        self.jobs_enqueued_total = self._counter(
            "jobs_enqueued_total", "Jobs that were taken into the queue."
        )
        self.admin_actions_total = self._counter(
            "admin_actions_total",
            "Changes that operators asked for.",
            ("outcome",),
            ("done", "refused", "failed"),
        )
        self.read_bytes_served_total = self._counter(
            "read_bytes_served_total",
            "Bytes of records and pages that readers were given, by tier.",
            ("tier",),
            TIERS,
        )
        self.storage_quota_exhausted_total = self._counter(
            "storage_quota_exhausted_total", "Reservations refused for want of quota."
        )
        self.page_fetch_latency_seconds = self._histogram(
            "page_fetch_latency_seconds",
            "Time to fetch a page or a block, by the tier it came from.",
            _FAST_SECONDS,
            ("tier",),
            TIERS,
        )
        self._cached_pages = (
            self.page_fetch_latency_seconds.labels("page_cache"),
            self.read_bytes_served_total.labels("page_cache"),
        )
        self._catalogue_of_stores()
        self._catalogue_of_collection()
        Gauge(
            "read_amplification",
            "Bytes fetched from the remote store for each byte served from it, since the start.",
            registry=self.registry,
        ).set_function(self._read_amplification)
        self._catalogue_of_http()
        self._gauges = {
            name: Gauge(name, text, registry=self.registry)
            for name, text in (
                ("checkpoint_queue_depth", "Jobs that wait or run."),
                ("wal_bytes", "Bytes of WAL on the local disk."),
                ("wal_budget_bytes", "What the WAL may take of the local disk."),
                ("storage_quota_limit_bytes", "The global limit of the local disk's use."),
                ("storage_quota_used_bytes", "Bytes reserved or used on the local disk."),
                ("hot_cache_bytes", "Bytes of blobs kept on the local disk."),
                ("page_cache_bytes", "Bytes of pages kept in memory."),
                ("cold_scans_active", "Cold scans that are open."),
                ("gc_queue_blobs", "Retired objects that are not deleted yet."),
                ("gc_paused", "1 while a jump of the wall clock keeps collection from going on."),
                ("gc_lag_seconds", "How long the oldest retired object is overdue."),
                ("body_memory_bytes", "Memory that request bodies hold."),
                ("event_loop_tasks", "Tasks that have not ended."),
                ("service_ready", "1 while the service is ready."),
            )
        }
        degraded = Gauge(
            "service_degraded",
            "1 for a part that fails while the service goes on.",
            ("part",),
            registry=self.registry,
        )
        self._gauges |= {f"service_degraded.{part}": degraded.labels(part) for part in PARTS}
        self.unwatch()

    def _catalogue_of_stores(self) -> None:
        self.remote_throttled_total = self._counter(
            "remote_throttled_total",
            "Attempts answered with 429 or SlowDown.",
        )
        self.remote_requests_total = Counter(
            "remote_requests_total",
            "Requests to the remote store.",
            ("op", "outcome"),
            registry=self.registry,
        )
        self.remote_request_seconds = self._histogram(
            "remote_request_seconds",
            "Time of a request to the remote store, retries apart.",
            _SLOW_SECONDS,
            ("op",),
            REMOTE_OPS,
        )
        for op in REMOTE_OPS:
            for outcome in REMOTE_OUTCOMES:
                self.remote_requests_total.labels(op, outcome)
        self.remote_bytes_read_total = self._counter(
            "remote_bytes_read_total", "Bytes read from the remote store.", ("mode",), READ_MODES
        )
        self.cold_scan_bandwidth_bytes = self._histogram(
            "cold_scan_bandwidth_bytes",
            "Bytes a second that a tenant's scans read, second by second.",
            _BYTES_PER_SECOND,
        )
        self.verified_blobs_total = self._counter(
            "verified_blobs_total",
            "Blobs that were read whole and compared.",
            ("outcome",),
            VERIFICATION_OUTCOMES,
        )
        self.cold_scan_pauses_total = self._counter(
            "cold_scan_pauses_total", "Times that scans were paused for foreground reads."
        )
        self.remote_bytes_written_total = self._counter(
            "remote_bytes_written_total", "Bytes written to the remote store."
        )
        self.manifest_write_errors_total = self._counter(
            "manifest_write_errors_total", "Manifest transactions that failed."
        )
        self.manifest_commit_seconds = self._histogram(
            "manifest_commit_seconds", "Time of a manifest transaction.", _FAST_SECONDS
        )
        self.wal_flush_seconds = self._histogram(
            "wal_flush_seconds", "Time of one write and fdatasync of the WAL.", _FAST_SECONDS
        )
        self.wal_appended_bytes_total = self._counter(
            "wal_appended_bytes_total", "Bytes made durable in the WAL."
        )

    def _catalogue_of_collection(self) -> None:
        self.gc_expired_generations_total = self._counter(
            "gc_expired_generations_total", "Generations that retention or a deletion took out."
        )
        self.gc_retired_blobs_total = self._counter(
            "gc_retired_blobs_total", "Objects that lost the last row that named them."
        )
        self.gc_retired_bytes_total = self._counter(
            "gc_retired_bytes_total", "Bytes of blobs that lost the last row that named them."
        )
        self.gc_deleted_blobs_total = self._counter(
            "gc_deleted_blobs_total", "Objects that the collector deleted."
        )
        self.gc_deleted_bytes_total = self._counter(
            "gc_deleted_bytes_total", "Bytes of blobs that the collector deleted."
        )
        self.gc_failures_total = self._counter(
            "gc_failures_total", "Objects that could not be deleted, and rounds that failed."
        )
        self.gc_pauses_total = self._counter(
            "gc_pauses_total", "Times that a jump of the wall clock stopped collection."
        )

    def _catalogue_of_http(self) -> None:
        self.http_requests_total = Counter(
            "http_requests_total",
            "Answered requests.",
            ("method", "handler", "status"),
            registry=self.registry,
        )
        self.http_request_duration_seconds = Histogram(
            "http_request_duration_seconds",
            "From a request's head to its answer's end.",
            ("method", "handler"),
            buckets=_HTTP_SECONDS,
            registry=self.registry,
        )

        self.http_connections = Gauge(
            "http_connections", "Open connections of clients.", registry=self.registry
        )

    def _counter(
        self, name: str, text: str, labels: tuple[str, ...] = (), values: Iterable[str] = ()
    ) -> Counter:
        counter = Counter(name, text, labels, registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def _histogram(
        self,
        name: str,
        text: str,
        buckets: tuple[float, ...],
        labels: tuple[str, ...] = (),
        values: Iterable[str] = (),
    ) -> Histogram:
        histogram = Histogram(name, text, labels, buckets=buckets, registry=self.registry)
        for value in values:
            histogram.labels(value)
        return histogram

    def _read_amplification(self) -> float:
        served = self.read_bytes_served_total.labels("remote")._value.get()  # noqa: SLF001
        fetched = self.remote_bytes_read_total.labels("normal")._value.get()  # noqa: SLF001
        return float(fetched / served) if served else 0.0

    # --- events -------------------------------------------------------------------------------

    def _ended(self, outcome: str) -> None:
        self.checkpoints_total.labels(outcome).inc()
        if outcome != "cancelled":
            self._success_rate.add(succeeded=outcome != "failed")

    def _on_checkpoint_published(self, fields: Fields) -> None:
        for size in _numbers(fields.get("chunk_bytes")):
            self.chunk_bytes.observe(size)
        if fields.get("kind") == "coalesce_chunks":
            self.coalesced_chunks_total.inc(_number(fields.get("merged_chunks")) or 0)
            return
        self._ended("published")
        for length in _numbers(fields.get("delta_chain_lengths")):
            self.delta_chain_length.observe(length)

    def _on_checkpoint_completed(self, fields: Fields) -> None:
        if fields.get("kind") == "coalesce_chunks":
            self.coalesced_bytes_total.inc(_number(fields.get("bytes_uploaded")) or 0)
            return
        if (seconds := _number(fields.get("seconds"))) is not None:
            self.checkpoint_duration_seconds.observe(seconds, exemplar())
        uploaded = _number(fields.get("bytes_uploaded"))
        if uploaded is not None:
            self.checkpoint_bytes_uploaded_total.inc(uploaded)
            if dirtied := _number(fields.get("bytes_dirtied")):
                self.write_amplification.observe(uploaded / dirtied)

    def _on_job_ended(self, outcome: str, fields: Fields) -> None:
        if fields.get("kind") == "create_checkpoint":
            self._ended(outcome)

    def _on_job_retrying(self, fields: Fields) -> None:
        del fields
        self.job_retries_total.inc()

    def _on_read_served(self, fields: Fields) -> None:
        if (seconds := _number(fields.get("seconds"))) is not None:
            tier = str(fields["tier"])
            self.page_fetch_latency_seconds.labels(tier).observe(seconds, exemplar())
            if served := _number(fields.get("bytes")):
                self.read_bytes_served_total.labels(tier).inc(served)

    def _on_remote_requested(self, fields: Fields) -> None:
        op = str(fields["op"])
        self.remote_requests_total.labels(op, str(fields["outcome"])).inc()
        if (seconds := _number(fields.get("seconds"))) is not None:
            self.remote_request_seconds.labels(op).observe(seconds)
        if read := _number(fields.get("bytes_read")):
            self.remote_bytes_read_total.labels(str(fields.get("mode", "normal"))).inc(read)
        if written := _number(fields.get("bytes_written")):
            self.remote_bytes_written_total.inc(written)

    def _on_blob_verified(self, fields: Fields) -> None:
        self.verified_blobs_total.labels(str(fields["outcome"])).inc()

    def _on_cold_scan_measured(self, fields: Fields) -> None:
        if (rate := _number(fields.get("bytes_per_second"))) is not None:
            self.cold_scan_bandwidth_bytes.observe(rate)

    def _on_expired(self, fields: Fields) -> None:
        self.gc_expired_generations_total.inc(_number(fields.get("generations")) or 0)
        self.gc_retired_blobs_total.inc(_number(fields.get("blobs")) or 0)
        self.gc_retired_bytes_total.inc(_number(fields.get("bytes")) or 0)

    def _on_collected(self, fields: Fields) -> None:
        self.gc_deleted_blobs_total.inc(_number(fields.get("blobs")) or 0)
        self.gc_deleted_bytes_total.inc(_number(fields.get("bytes")) or 0)
        self.gc_failures_total.inc(_number(fields.get("failed")) or 0)

    def _on_manifest_committed(self, fields: Fields) -> None:
        if (seconds := _number(fields.get("seconds"))) is not None:
            self.manifest_commit_seconds.observe(seconds)

    def _on_wal_flushed(self, fields: Fields) -> None:
        if (seconds := _number(fields.get("seconds"))) is not None:
            self.wal_flush_seconds.observe(seconds)
        if written := _number(fields.get("bytes")):
            self.wal_appended_bytes_total.inc(written)


def exemplar() -> dict[str, str] | None:
    """The trace that this belongs to, shown in OpenMetrics beside the bucket."""
    trace_id = context_fields().get("trace_id")
    return None if trace_id is None else {"trace_id": str(trace_id)}


def _zero() -> float:
    return 0.0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _numbers(value: object) -> Iterable[float]:
    found: Any = value if isinstance(value, list | tuple) else ()
    return (float(one) for one in found)
