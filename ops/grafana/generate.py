"""Makes the dashboards: `python -m ops.grafana.generate` writes ops/grafana/*.json and the chart's
copies of them and of the alert rules. A test fails where what is committed is not what this makes.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CHART_FILES = REPOSITORY / "helm" / "bop-checkpoint" / "files"
RULES = REPOSITORY / "ops" / "prometheus" / "rules.yml"

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
PICK = 'instance=~"$instance"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    expr: str
    legend: str = "{{instance}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    title: str
    says: str
    lines: Sequence[Line]
    unit: str
    kind: Literal["lines", "number"] = "lines"
    width: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    title: str
    graphs: Sequence[Graph]


def quantiles(metric: str, by: str = "", window: str = "5m") -> list[Line]:
    labels = f"le, {by}" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return [
        Line(
            expr=f"histogram_quantile({q}, {_buckets(metric, labels, window)})",
            legend=f"{legend}p{round(q * 100)}",
        )
        for q in (0.5, 0.99)
    ]


def _buckets(metric: str, labels: str, window: str) -> str:
    return f"sum by ({labels}) (rate({metric}_bucket{{{PICK}}}[{window}]))"


def rate(metric: str, by: str, *, match: str = "") -> Line:
    extra = f", {match}" if match else ""
    return Line(expr=f"sum by ({by}) (rate({metric}{{{PICK}{extra}}}[5m]))", legend=f"{{{{{by}}}}}")


CHECKPOINTS = (
    Row(
        title="Is everything on S3?",
        graphs=(
            Graph(
                title="Success rate, 1 h",
                says="Checkpoints that were published or found nothing to do. Target: above 99 %.",
                lines=[Line(expr=f"checkpoint_success_rate{{{PICK}}}")],
                unit="percentunit",
                kind="number",
                width=6,
            ),
            Graph(
                title="Oldest unpublished data",
                says="How long acknowledged data has waited for a checkpoint.",
                lines=[Line(expr=f"unpublished_wal_age_max_seconds{{{PICK}}}")],
                unit="s",
                kind="number",
                width=6,
            ),
            Graph(
                title="Oldest remote position",
                says="Age of the newest position that the bucket restores, of the database last.",
                lines=[Line(expr=f"remote_position_age_max_seconds{{{PICK}}}")],
                unit="s",
                kind="number",
                width=6,
            ),
            Graph(
                title="Unhealthy databases",
                says="Damaged or lost WAL, or a generation that failed verification.",
                lines=[Line(expr=f"databases_unhealthy{{{PICK}}}")],
                unit="short",
                kind="number",
                width=6,
            ),
        ),
    ),
    Row(
        title="Checkpoints",
        graphs=(
            Graph(
                title="Duration",
                says="From a checkpoint's start to its completion. Target: p99 below 60 s.",
                lines=quantiles("checkpoint_duration_seconds", window="30m"),
                unit="s",
            ),
            Graph(
                title="Ended, by outcome",
                says="Checkpoints per second.",
                lines=[rate("checkpoints_total", "outcome")],
                unit="ops",
            ),
            Graph(
                title="Queue",
                says="Jobs that wait. Target: below 5.",
                lines=[Line(expr=f"checkpoint_queue_depth{{{PICK}}}")],
                unit="short",
            ),
            Graph(
                title="Uploaded",
                says="Bytes per second that published checkpoints uploaded.",
                lines=[rate("checkpoint_bytes_uploaded_total", "instance")],
                unit="Bps",
            ),
            Graph(
                title="Write amplification",
                says="Bytes uploaded per byte dirtied.",
                lines=quantiles("write_amplification", window="30m"),
                unit="short",
            ),
            Graph(
                title="Delta chains",
                says="Deltas over a chunk's base after a checkpoint.",
                lines=quantiles("delta_chain_length", window="30m"),
                unit="short",
            ),
        ),
    ),
)

RESOURCES = (
    Row(
        title="Disk",
        graphs=(
            Graph(
                title="WAL",
                says="Bytes of WAL and their budget.",
                lines=[
                    Line(expr=f"wal_bytes{{{PICK}}}", legend="used"),
                    Line(expr=f"wal_budget_bytes{{{PICK}}}", legend="budget"),
                ],
                unit="bytes",
            ),
            Graph(
                title="Quota",
                says="Bytes of WAL, scratch and hot cache, and the global limit.",
                lines=[
                    Line(expr=f"storage_quota_used_bytes{{{PICK}}}", legend="used"),
                    Line(expr=f"storage_quota_limit_bytes{{{PICK}}}", legend="limit"),
                    Line(expr=f"hot_cache_bytes{{{PICK}}}", legend="hot cache"),
                ],
                unit="bytes",
            ),
            Graph(
                title="Refused for want of room",
                says="Reservations per second that met a full quota.",
                lines=[rate("storage_quota_exhausted_total", "instance")],
                unit="ops",
            ),
            Graph(
                title="WAL flush",
                says="One write and fdatasync.",
                lines=quantiles("wal_flush_seconds"),
                unit="s",
            ),
            Graph(
                title="Manifest commit",
                says="One LMDB transaction.",
                lines=quantiles("manifest_commit_seconds"),
                unit="s",
            ),
            Graph(
                title="Manifest write errors",
                says="Target: none.",
                lines=[Line(expr=f"increase(manifest_write_errors_total{{{PICK}}}[1h])")],
                unit="short",
            ),
        ),
    ),
    Row(
        title="Remote store",
        graphs=(
            Graph(
                title="Requests",
                says="Requests per second, by operation.",
                lines=[rate("remote_requests_total", "op")],
                unit="reqps",
            ),
            Graph(
                title="Failed and throttled",
                says="Requests per second that failed, and that the store slowed down.",
                lines=[
                    rate("remote_requests_total", "op", match='outcome="error"'),
                    Line(
                        expr=f"sum (rate(remote_throttled_total{{{PICK}}}[5m]))", legend="throttled"
                    ),
                ],
                unit="reqps",
            ),
            Graph(
                title="Read",
                says="Bytes per second; cold is what cold scans read.",
                lines=[rate("remote_bytes_read_total", "mode")],
                unit="Bps",
            ),
        ),
    ),
)

TRAFFIC = (
    Row(
        title="Requests",
        graphs=(
            Graph(
                title="Answers, by status",
                says="Per second.",
                lines=[rate("http_requests_total", "status")],
                unit="reqps",
            ),
            Graph(
                title="Time to answer",
                says="By route, 99th percentile.",
                lines=[
                    Line(
                        expr="histogram_quantile(0.99, "
                        + _buckets("http_request_duration_seconds", "le, handler", "5m")
                        + ")",
                        legend="{{handler}}",
                    )
                ],
                unit="s",
            ),
            Graph(
                title="Appended",
                says="Bytes per second made durable.",
                lines=[rate("wal_appended_bytes_total", "instance")],
                unit="Bps",
            ),
        ),
    ),
    Row(
        title="Reads",
        graphs=(
            Graph(
                title="Page fetch",
                says="By the tier that had it. Target: remote p99 below 0.5 s.",
                lines=quantiles("page_fetch_latency_seconds", "tier"),
                unit="s",
                width=12,
            ),
            Graph(
                title="Caches",
                says="Bytes held.",
                lines=[
                    Line(expr=f"page_cache_bytes{{{PICK}}}", legend="page cache"),
                    Line(expr=f"hot_cache_bytes{{{PICK}}}", legend="hot cache"),
                    Line(expr=f"body_memory_bytes{{{PICK}}}", legend="request bodies"),
                ],
                unit="bytes",
                width=12,
            ),
        ),
    ),
)

DASHBOARDS = {
    "checkpoints": ("bop-checkpoint: checkpoints", CHECKPOINTS),
    "resources": ("bop-checkpoint: disk and remote store", RESOURCES),
    "traffic": ("bop-checkpoint: requests and reads", TRAFFIC),
}


def expressions() -> list[str]:
    return [
        line.expr
        for _, rows in DASHBOARDS.values()
        for row in rows
        for graph in row.graphs
        for line in graph.lines
    ]


def build(name: str) -> str:
    """The dashboard's JSON."""
    title, rows = DASHBOARDS[name]
    builder = (
        dashboard.Dashboard(title)
        .uid(f"bop-checkpoint-{name}")
        .tags(["bop-checkpoint"])
        .editable()
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Instance")
            .datasource(SOURCE)
            .query("label_values(service_ready, instance)")
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    for row in rows:
        builder.with_row(dashboard.Row(row.title))
        for graph in row.graphs:
            builder.with_panel(_panel(graph))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _panel(graph: Graph) -> timeseries.Panel | stat.Panel:
    panel = stat.Panel() if graph.kind == "number" else timeseries.Panel()
    panel.title(graph.title).description(graph.says).datasource(SOURCE)
    panel.unit(graph.unit).span(graph.width).height(7)
    for line in graph.lines:
        panel.with_target(
            prometheus.Dataquery().expr(line.expr).legend_format(line.legend).datasource(SOURCE)
        )
    return panel


def made() -> dict[Path, str]:
    """Every file that this makes, with its content."""
    files = {}
    for name in DASHBOARDS:
        text = build(name)
        files[HERE / f"{name}.json"] = text
        files[CHART_FILES / "dashboards" / f"{name}.json"] = text
    files[CHART_FILES / "rules.yml"] = RULES.read_text(encoding="utf-8")
    return files


def main() -> None:
    shutil.rmtree(CHART_FILES, ignore_errors=True)
    for path, text in made().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
