"""Log lines and metrics, from events."""

import io
import json
import logging

import pytest

from app.core.base.events import Events, bound
from app.core.services.freshness import DatabaseFreshness
from app.observability.logging import log_sink, route_library_logs
from app.observability.metrics import Metrics
from app.routers.exchange import ResponseBroken
from tests.helpers.fake_clock import FakeClock

PLANNED = {
    "checkpoint_success_rate",
    "checkpoint_duration_seconds",
    "checkpoint_queue_depth",
    "checkpoints_total",
    "storage_quota_exhausted_total",
    "page_fetch_latency_seconds",
    "remote_requests_total",
    "remote_request_seconds",
    "remote_bytes_read_total",
    "remote_bytes_written_total",
    "manifest_write_errors_total",
    "manifest_commit_seconds",
    "wal_flush_seconds",
    "wal_appended_bytes_total",
    "delta_chain_length",
    "write_amplification",
    "read_amplification",
    "read_bytes_served_total",
    "cold_scan_bandwidth_bytes",
    "remote_throttled_total",
    "jobs_enqueued_total",
    "admin_actions_total",
    "remote_position_age_max_seconds",
    "unpublished_wal_age_max_seconds",
    "unpublished_wal_total_bytes",
    "http_connections",
}


@pytest.fixture
def lines():
    """Events, and the lines they become."""
    stream = io.BytesIO()
    events = Events(log_sink(log_format="json", level="info", stream=stream))
    return events, lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_is_json_with_its_event_level_time_and_fields(lines):
    events, read = lines
    events.info("checkpoint.published", generation=3, chunks=["a"], digest=b"\x00")
    (line,) = read()
    assert line["event"] == "checkpoint.published"
    assert line["level"] == "info"
    assert line["timestamp"].endswith("Z")
    assert line["generation"] == 3
    assert line["chunks"] == ["a"]


@pytest.mark.parametrize(
    "name", ["started", "staged", "uploaded", "published", "cleaned_up", "failed"]
)
def test_the_life_of_a_checkpoint_is_logged_with_its_fields(lines, name):
    events, read = lines
    fields = {"tenant": "acme", "database": "events", "job_id": "J", "run": 2}
    events.info(f"checkpoint.{name}", **fields)
    (line,) = read()
    assert line["event"] == f"checkpoint.{name}"
    assert fields.items() <= line.items()


def test_levels_below_are_dropped(lines):
    events, read = lines
    events.debug("quiet.thing")
    events.warning("loud.thing")
    assert [line["event"] for line in read()] == ["loud.thing"]


def test_a_line_carries_its_request(lines):
    events, read = lines
    with bound(request_id="r1", trace_id="t1", span_id="s1"):
        events.info("a.thing")
    events.info("a.thing")
    inside, outside = read()
    assert (inside["request_id"], inside["trace_id"], inside["span_id"]) == ("r1", "t1", "s1")
    assert "request_id" not in outside


def test_secrets_are_no_fields(lines):
    events, read = lines
    events.info("a.thing", token="canary", authorization="canary", body=b"canary", event="canary2")
    (line,) = read()
    assert line["event"] == "a.thing"
    assert "canary" not in {str(value) for value in line.values()}


def test_exceptions_are_shown_with_their_traceback(lines):
    events, read = lines
    try:
        raise ValueError("inside")
    except ValueError as error:
        events.error("a.failure", exception=error)
    (line,) = read()
    assert "ValueError: inside" in line["exception"]
    assert "test_observability" in line["exception"]


def test_library_logs_go_the_same_way(lines):
    events, read = lines
    root = logging.getLogger()
    kept = root.handlers[:], root.level
    try:
        route_library_logs(
            lambda name, level, fields: getattr(events, level)(name, **fields), level="info"
        )
        logging.getLogger("uvicorn.error").info("Started")
        logging.getLogger("uvicorn.error").error("told", exc_info=ResponseBroken("elsewhere"))
        logging.getLogger("some.library").debug("noise")
    finally:
        root.handlers[:], level = kept
        root.setLevel(level)
    assert [(line["event"], line["logger"], line["detail"]) for line in read()] == [
        ("library.logged", "uvicorn.error", "Started")
    ]


def test_console_lines_are_for_people(capsys):
    events = Events(log_sink(log_format="console", level="info"))
    events.info("service.started", port=8600)
    shown = capsys.readouterr().out
    assert "service.started" in shown
    assert "8600" in shown
    assert not shown.startswith("{")


# --- metrics


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_every_planned_metric_shows_before_anything_happened():
    body, _ = Metrics().exposition("")
    shown = {line.split("{")[0].split(" ")[0] for line in body.decode().splitlines()}
    for name in PLANNED:
        assert {name, f"{name}_count"} & shown, name
    assert 'checkpoints_total{outcome="published"} 0.0' in body.decode()
    assert 'page_fetch_latency_seconds_count{tier="remote"} 0.0' in body.decode()
    assert 'remote_requests_total{op="put_blob",outcome="ok"} 0.0' in body.decode()


def test_the_success_rate_is_that_of_the_last_hour():
    clock = FakeClock()
    metrics = Metrics(clock=clock)
    events = Events(metrics.sink)
    assert sample(metrics, "checkpoint_success_rate") == 1.0
    events.error("job.failed", kind="create_checkpoint")
    clock.advance(30 * 60)
    for _ in range(2):
        events.info("checkpoint.published", kind="create_checkpoint")
    events.info("checkpoint.unchanged", kind="create_checkpoint")
    events.info("job.cancelled", kind="create_checkpoint")
    events.error("job.failed", kind="verify_manifest")
    assert sample(metrics, "checkpoint_success_rate") == 0.75
    clock.advance(31 * 60)
    assert sample(metrics, "checkpoint_success_rate") == 1.0
    clock.advance(60 * 60)
    events.error("job.failed", kind="create_checkpoint")
    assert sample(metrics, "checkpoint_success_rate") == 0.0


def test_events_become_metrics():
    metrics = Metrics()
    events = Events(metrics.sink)
    checkpoint, coalescing = {"kind": "create_checkpoint"}, {"kind": "coalesce_chunks"}
    events.info(
        "checkpoint.published", delta_chain_lengths=[1, 3], chunk_bytes=[100, 200], **checkpoint
    )
    events.info(
        "checkpoint.completed", seconds=2.0, bytes_uploaded=300, bytes_dirtied=100, **checkpoint
    )
    events.info("checkpoint.published", merged_chunks=8, chunk_bytes=[900], **coalescing)
    events.info("checkpoint.completed", seconds=9.0, bytes_uploaded=900, **coalescing)
    events.info("checkpoint.unchanged", **checkpoint)
    events.error("job.failed", kind="create_checkpoint")
    events.info("job.cancelled", kind="create_checkpoint")
    events.error("job.failed", kind="verify_manifest")
    events.warning("job.retrying")
    events.debug("quota.exhausted", tenant="acme")
    events.debug("read.served", tier="local", seconds=0.001)
    events.debug(
        "remote.requested", op="get_blob", outcome="ok", seconds=0.2, bytes_read=10, mode="cold"
    )
    events.debug("remote.requested", op="put_blob", outcome="error", bytes_written=5)
    events.debug("manifest.committed", seconds=0.01)
    events.error("manifest.map_full")
    events.error("manifest.failed")
    events.debug("wal.flushed", seconds=0.001, bytes=4096)
    events.info("collection.expired", db_id=1, generations=2, rows=3, blobs=4, bytes=50)
    events.info("collection.collected", doomed=1, kept=0, blobs=3, bytes=40, failed=1)
    events.warning("collection.failed", code="remote_unavailable")
    events.error("collection.paused")
    events.info("something.else", seconds="not a number")
    for outcome in ("published", "no_changes", "failed", "cancelled"):
        assert sample(metrics, "checkpoints_total", outcome=outcome) == 1, outcome
    assert sample(metrics, "checkpoint_duration_seconds_sum") == 2.0
    assert sample(metrics, "checkpoint_bytes_uploaded_total") == 300
    assert sample(metrics, "write_amplification_sum") == 3.0
    assert sample(metrics, "delta_chain_length_count") == 2
    assert sample(metrics, "chunk_bytes_sum") == 1200
    assert sample(metrics, "coalesced_chunks_total") == 8
    assert sample(metrics, "coalesced_bytes_total") == 900
    assert sample(metrics, "job_retries_total") == 1
    assert sample(metrics, "storage_quota_exhausted_total") == 1
    assert sample(metrics, "page_fetch_latency_seconds_count", tier="local") == 1
    assert sample(metrics, "remote_requests_total", op="get_blob", outcome="ok") == 1
    assert sample(metrics, "remote_requests_total", op="put_blob", outcome="error") == 1
    assert sample(metrics, "remote_request_seconds_count", op="get_blob") == 1
    assert sample(metrics, "remote_bytes_read_total", mode="cold") == 10
    assert sample(metrics, "remote_bytes_written_total") == 5
    assert sample(metrics, "manifest_commit_seconds_count") == 1
    assert sample(metrics, "manifest_write_errors_total") == 2
    assert sample(metrics, "gc_expired_generations_total") == 2
    assert sample(metrics, "gc_retired_blobs_total") == 4
    assert sample(metrics, "gc_retired_bytes_total") == 50
    assert sample(metrics, "gc_deleted_blobs_total") == 3
    assert sample(metrics, "gc_deleted_bytes_total") == 40
    assert sample(metrics, "gc_failures_total") == 2
    assert sample(metrics, "gc_pauses_total") == 1
    assert sample(metrics, "wal_flush_seconds_count") == 1
    assert sample(metrics, "wal_appended_bytes_total") == 4096


def test_tenants_are_never_labels():
    metrics = Metrics()
    Events(metrics.sink).debug("quota.exhausted", tenant="acme", database="events")
    body, _ = metrics.exposition("")
    assert "acme" not in body.decode()


def test_gauges_are_watched_and_let_go():
    metrics = Metrics()
    metrics.watch({"wal_bytes": lambda: 7.0, "service_degraded.manifest": lambda: True})
    assert sample(metrics, "wal_bytes") == 7.0
    assert sample(metrics, "service_degraded", part="manifest") == 1
    assert sample(metrics, "service_degraded", part="remote") == 0
    metrics.unwatch()
    assert sample(metrics, "wal_bytes") == 0.0
    with pytest.raises(KeyError):
        metrics.watch({"no_such_gauge": lambda: 1.0})


def test_openmetrics_names_its_counters():
    body, media_type = Metrics().exposition("application/openmetrics-text; version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    assert b"# TYPE checkpoints counter" in body
    assert body.endswith(b"# EOF\n")


def test_a_bucket_shows_the_trace_it_belongs_to():
    metrics = Metrics()
    with bound(trace_id="4bf92f3577b34da6a3ce929d0e0e4736"):
        Events(metrics.sink).info("checkpoint.completed", seconds=2.0)
        metrics.on_answer(method="GET", template="/jobs", status=200, seconds=0.1)
    body, _ = metrics.exposition("application/openmetrics-text; version=1.0.0")
    marked = [line for line in body.decode().splitlines() if "4bf92f3577b3" in line]
    assert len(marked) == 2
    assert all("_bucket{" in line and " # {trace_id=" in line for line in marked)


def test_single_databases_are_shown_within_a_bound_and_all_of_them_in_the_totals():
    metrics = Metrics(databases_max=2)
    metrics.freshness.show(
        [
            DatabaseFreshness(
                tenant="acme", database=f"db{number}", remote_age_seconds=10.0 * number,
                unpublished_age_seconds=number, unpublished_bytes=100,
            )
            for number in range(4)
        ]
    )  # fmt: skip
    assert sample(metrics, "remote_position_age_max_seconds") == 30.0
    assert sample(metrics, "unpublished_wal_age_max_seconds") == 3.0
    assert sample(metrics, "unpublished_wal_total_bytes") == 400.0
    assert sample(metrics, "databases") == 4.0
    shown = {"tenant": "acme", "database": "db1"}
    assert sample(metrics, "remote_position_age_seconds", **shown) == 10.0
    assert metrics.registry.get_sample_value(
        "remote_position_age_seconds", {"tenant": "acme", "database": "db2"}
    ) is None  # fmt: skip


def test_read_amplification_is_what_was_fetched_for_what_was_served():
    metrics = Metrics()
    events = Events(metrics.sink)
    assert sample(metrics, "read_amplification") == 0.0
    events.debug("read.served", tier="remote", seconds=0.1, bytes=100)
    events.debug("remote.requested", op="get_blob", outcome="ok", bytes_read=250, mode="normal")
    events.debug("remote.requested", op="get_blob", outcome="ok", bytes_read=999, mode="cold")
    assert sample(metrics, "read_amplification") == 2.5
