"""Alerts and dashboards: they parse, fire and clear, and speak of metrics and pages that exist."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ops.grafana.generate import expressions, made
from tests.helpers.server import ServerProcess

REPOSITORY = Path(__file__).resolve().parents[2]
PROMETHEUS = REPOSITORY / "ops" / "prometheus"
PROMTOOL = REPOSITORY / ".venv" / "tools" / "debian" / "usr" / "bin" / "promtool"
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
SCRAPED_BY_PROMETHEUS = {"up"}


def rules() -> Iterator[dict[str, Any]]:
    for group in RULES["groups"]:
        yield from group["rules"]


ALERTS = [rule for rule in rules() if "alert" in rule]
RECORDED = {rule["record"] for rule in rules() if "record" in rule}
EXPRESSIONS = [rule["expr"] for rule in rules()] + [
    expr.replace("$instance", ".*") for expr in expressions()
]


def selectors(node: Any) -> Iterator[str]:
    """The metric names that an expression reads."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name
    elif isinstance(node, promql_parser.MatrixSelector):
        yield from selectors(node.vector_selector)
    elif isinstance(node, promql_parser.BinaryExpr):
        yield from selectors(node.lhs)
        yield from selectors(node.rhs)
    elif isinstance(node, promql_parser.Call):
        for argument in node.args:
            yield from selectors(argument)
    elif isinstance(node, promql_parser.AggregateExpr | promql_parser.ParenExpr):
        yield from selectors(node.expr)
    elif not isinstance(node, promql_parser.NumberLiteral):
        raise TypeError(f"an expression of a kind that is not looked into: {type(node)}")


@pytest.fixture
def promtool() -> str:
    if not PROMTOOL.exists():
        pytest.skip("promtool is not installed: make tools")
    return str(PROMTOOL)


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")],
    ids=["check", "test"],
)
def test_rules_pass_promtool(promtool: str, arguments: tuple[str, ...]):
    ran = subprocess.run(
        [promtool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_is_shown_to_fire_and_to_clear():
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    fires, clears = set(), set()
    for each in tests:
        for expected in each["alert_rule_test"]:
            (fires if expected["exp_alerts"] else clears).add(expected["alertname"])
    assert fires == clears == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_says_what_to_do(alert: dict[str, Any]):
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert {"summary", "description", "runbook_url"} == set(alert["annotations"])
    assert (REPOSITORY / alert["annotations"]["runbook_url"]).is_file()


def test_runbooks_list_the_alerts_that_lead_to_them():
    text = (REPOSITORY / "docs" / "runbooks" / "README.md").read_text()
    listed = {
        f"docs/runbooks/{page}": set(re.findall(r"\bBop\w+", alerts))
        for page, alerts in re.findall(r"^\| \[.+?\]\((.+?)\) \| (.+) \|$", text, re.MULTILINE)
    }
    led_to: dict[str, set[str]] = {page: set() for page in listed}
    for alert in ALERTS:
        led_to[alert["annotations"]["runbook_url"]].add(alert["alert"])
    assert listed == led_to


async def test_every_metric_that_is_asked_for_exists(server: ServerProcess):
    async with httpx.AsyncClient(base_url=server.base_url) as client:
        text = (await client.get("/metrics")).text
    there = set(re.findall(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)[{ ]", text, re.MULTILINE))
    asked = {name for each in EXPRESSIONS for name in selectors(promql_parser.parse(each))}
    assert asked - there - RECORDED - SCRAPED_BY_PROMETHEUS == set()
    assert len(asked) > 20


async def test_operations_list_every_metric_there_is(server: ServerProcess):
    """By name, type and labels, and no other."""
    rows = re.findall(
        r"^\| `(\w+)` \| (counter|gauge|histogram) \| (.*?) \|",
        (REPOSITORY / "docs" / "operations.md").read_text(),
        re.MULTILINE,
    )
    listed = {name: (kind, set(re.findall(r"\w+", labels))) for name, kind, labels in rows}
    async with httpx.AsyncClient(base_url=server.base_url) as client:
        await client.put("/tenants/acme/databases/log", json={"engine": "append_only"})
        text = (await client.get("/metrics")).text
    found = {}
    for family in text_string_to_metric_families(text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels}
        found[name] = (family.type, labels - {"le"})
    assert listed == {name: each for name, each in found.items() if not name.endswith("_created")}


def test_generated_files_are_what_is_committed():
    for path, text in made().items():
        assert path.read_text() == text, f"{path}: make dashboards"


def test_compose_mounts_files_that_exist():
    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    mounts = [
        mount.split(":")[0] for each in services.values() for mount in each.get("volumes", ())
    ]
    files = [mount for mount in mounts if mount.startswith("./")]
    assert len(files) >= 6
    assert all((REPOSITORY / each).exists() for each in files), files
