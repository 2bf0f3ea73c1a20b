"""The Helm chart: it renders, what it renders is valid and hardened, and bad values are refused."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from helm_python import Chart, HelmError

from app.settings import Settings
from tests.ops.chart_values import MAXIMAL

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "helm" / "bop-checkpoint"
CHECKOV = REPOSITORY / ".venv" / "tools" / "checkov" / "bin" / "checkov"
KUBERNETES = "1.34.0"
NOT_ASKED = (
    "CKV_K8S_43",  # a digest: the installer's to choose; the default is the chart's version
    "CKV_K8S_15",  # pulling always: a pod should come back while the registry is away
    "CKV_K8S_35",  # no secrets in the environment: the AWS SDK's chain takes its keys from there
)
CUSTOM_KINDS = {"ServiceMonitor", "PrometheusRule"}
PUBLIC = {"/tenants", "/checkpoints", "/truncations", "/jobs", "/cold-scan", "/changes"}

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def chart() -> Iterator[Chart]:
    with Chart.load(str(CHART)) as chart:
        yield chart


def render(chart: Chart, values: dict[str, Any] | None = None) -> list[Manifest]:
    rendered = chart.render(values or {}, name="bop", namespace="storage")
    return [
        document
        for path, text in sorted(rendered.items())
        if path.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [each for each in manifests if each["kind"] == kind]


def test_chart_lints():
    found = helm_python.lint(str(CHART), MAXIMAL, strict=True, kube_version=f"v{KUBERNETES}")
    assert found["errors"] == []
    assert {each["error"] for each in found["messages"]} <= {"icon is recommended"}


@pytest.mark.parametrize("values", [{}, MAXIMAL], ids=["default", "maximal"])
def test_chart_renders_valid_manifests(chart: Chart, values: dict[str, Any]):
    manifests = render(chart, values)
    kinds = {each["kind"] for each in manifests}
    assert {"StatefulSet", "Service", "NetworkPolicy", "PodDisruptionBudget"} <= kinds
    assert (CUSTOM_KINDS | {"Ingress"} <= kinds) == bool(values)
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        labels = manifest["metadata"]["labels"]
        assert labels["app.kubernetes.io/name"] == "bop-checkpoint"
        assert labels["app.kubernetes.io/instance"] == "bop"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"


@pytest.mark.parametrize("values", [{}, MAXIMAL], ids=["default", "maximal"])
def test_chart_passes_checkov(chart: Chart, values: dict[str, Any], tmp_path: Path):
    if not CHECKOV.exists():
        pytest.skip("checkov is not installed: make tools")
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(yaml.safe_dump_all(render(chart, values)))
    ran = subprocess.run(
        [CHECKOV, "-f", rendered, "--framework", "kubernetes", "--compact", "--quiet",
         "--skip-download", "--output", "json", "--skip-check", ",".join(NOT_ASKED)],
        capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    report = json.loads(ran.stdout)
    failed = [(each["check_id"], each["resource"]) for each in report["results"]["failed_checks"]]
    assert failed == [], ran.stdout[-2000:]
    assert report["summary"]["passed"] > 50


def test_pod_runs_as_nobody_and_writes_only_its_volume(chart: Chart):
    pod = of_kind(render(chart), "StatefulSet")[0]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    [container] = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {each["mountPath"] for each in container["volumeMounts"]} == {
        "/data", "/tmp", "/etc/bop/tokens",
    }  # fmt: skip


def test_ingress_leaves_operations_out(chart: Chart):
    [ingress] = of_kind(render(chart, MAXIMAL), "Ingress")
    paths = {each["path"] for each in ingress["spec"]["rules"][0]["http"]["paths"]}
    assert paths >= PUBLIC
    assert not any(re.match(r"/(admin|debug|metrics)?(/|$)", each) for each in paths)
    ports = {
        each["backend"]["service"]["port"]["name"]
        for each in ingress["spec"]["rules"][0]["http"]["paths"]
    }
    assert ports == {"http"}, "never the admin port"


def test_admin_port_is_reached_by_nobody_unless_named(chart: Chart):
    def admin_rules(values: dict[str, Any]) -> list[Any]:
        [policy] = of_kind(render(chart, values), "NetworkPolicy")
        return [
            rule["from"]
            for rule in policy["spec"]["ingress"]
            if any(port["port"] == "admin" for port in rule["ports"])
        ]

    assert admin_rules({}) == []
    assert admin_rules(MAXIMAL) == [MAXIMAL["networkPolicy"]["adminFrom"]]


def test_runbooks_are_where_the_installer_says(chart: Chart):
    def urls(**rule: str) -> set[str]:
        values = {"metrics": {"prometheusRule": {"enabled": True, **rule}}}
        [rules] = of_kind(render(chart, values), "PrometheusRule")
        return {
            alert["annotations"]["runbook_url"]
            for group in rules["spec"]["groups"]
            for alert in group["rules"]
            if "alert" in alert
        }

    pages = {f"docs/runbooks/{page.name}" for page in (REPOSITORY / "docs/runbooks").glob("*.md")}
    assert urls() <= pages
    assert all(url.startswith("https://wiki/x/") for url in urls(runbookBaseUrl="https://wiki/x"))


def test_the_alerts_know_the_service_whatever_its_release_is_called(chart: Chart):
    values = {"fullnameOverride": "other", "metrics": {"serviceMonitor": {"enabled": True}}}
    [monitor] = of_kind(render(chart, values), "ServiceMonitor")
    [job] = [
        rule["replacement"]
        for rule in monitor["spec"]["endpoints"][0]["relabelings"]
        if rule.get("targetLabel") == "job"
    ]
    rules = (CHART / "files" / "rules.yml").read_text()
    asked = set(re.findall(r'up\{job=~"([^"]+)"\}', rules))
    assert asked
    assert all(re.fullmatch(pattern, job) for pattern in asked)


@pytest.mark.parametrize("values", [{}, MAXIMAL], ids=["default", "maximal"])
def test_chart_sets_only_settings_that_exist(chart: Chart, values: dict[str, Any]):
    [config] = [
        each for each in of_kind(render(chart, values), "ConfigMap") if "BOP_HOST" in each["data"]
    ]
    names = set(config["data"])
    assert names <= {f"BOP_{name.upper()}" for name in Settings.model_fields}
    settings = Settings.model_validate(
        {name.lower().removeprefix("bop_"): value for name, value in config["data"].items()}
    )
    pod = of_kind(render(chart, values), "StatefulSet")[0]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > settings.shutdown_seconds


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 2},
        {"ingress": {"enabled": True, "paths": ["/admin"]}},
        {"ingress": {"enabled": True, "paths": ["/debug/wal"]}},
        {"ingress": {"enabled": True, "paths": ["/tenants/../admin"]}},
        {"adminPort": 8600},
        {"terminationGracePeriodSeconds": 25},
        {"settings": {"BOP_SHUTDOWN_SECONDS": "60"}},
        {"settings": {"BOP_HOST": "::"}},
        {"settings": {"PATH": "/"}},
        {"persistence": {"accessModes": ["ReadWriteMany"]}},
        {"remote": {"url": "http://bucket"}},
        {"auth": {"existingSecret": ""}},
    ],
    ids=str,
)
def test_bad_values_are_refused(chart: Chart, values: dict[str, Any]):
    with pytest.raises(HelmError):
        chart.render(values, name="bop", namespace="storage")


def test_readme_lists_every_value():
    text = (CHART / "README.md").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for top in values:
        assert f"`{top}" in text, top
