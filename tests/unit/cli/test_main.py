import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import httpx
import pytest
import yaml

from app import __version__
from app.cli.failures import API_HINTS, HINTS
from app.cli.jobs import Kind
from app.cli.main import hoisted, wants_json
from app.core.stores.manifest.records import JobKind
from tests.helpers.fake_api import problem

REPOSITORY = Path(__file__).resolve().parents[3]
HEAVY = ("fastapi", "uvicorn", "lmdb", "aiobotocore", "pydantic", "httpx", "rich", "numpy")


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from app.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        f"    print([name for name in {HEAVY!r} if name in sys.modules], end.code)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.splitlines()[-1] == "[] 0"
    assert "append" in ended.stdout


def test_talking_to_a_service_imports_no_server():
    code = (
        "import sys, app.client, app.cli.main, app.cli.drawing\n"
        "print([name for name in ('fastapi', 'uvicorn', 'lmdb', 'aiobotocore', 'pydantic_settings',"
        " '_awscrt') if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize(
    "command",
    [
        ["databases", "show", "a/b"],
        ["restore", "a/b", "-o", "restored.db"],
        ["replicate", "source.db", "a/b", "--once"],
    ],
    ids=" ".join,
)
def test_commands_load_nothing_to_draw_with(tmp_path: Path, command: list[str]):
    """Where nothing is drawn: httpx would bring rich for a command line of its own."""
    code = (
        "import sys\n"
        "from app.cli.main import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    loaded = [name for name in ('rich', 'pygments', 'click') if name in sys.modules]\n"
        "    print(loaded, 'httpx' in sys.modules, end.code)\n"
    )
    arguments = ["--url", "http://127.0.0.1:9", "--output", "json", *command]
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert ended.stdout.splitlines()[-1] == "[] True 1"


CONTRACT = {
    "": "serve recover demo append records replicate restore checkpoint generations truncate fork "
    "cold-scan verify gc janitor fsck",
    "databases": "create list show delete",
    "snapshots": "create list delete",
    "jobs": "list show watch cancel",
    "leases": "list release",
    "approvals": "list approve reject",
    "flags": "show set",
    "quota": "show set",
    "queue": "drain resume show",
    "manifest": "backup stats change-log",
    "tokens": "hash",
}
OPTIONS = {
    "serve": "--print-config --take-over",
    "replicate": "--once --checkpoint --config",
    "restore": "-o --generation --snapshot --at",
    "checkpoint": "--wait",
    "truncate": "--head --tail",
    "cold-scan": "-o",
    "fsck": "--data-dir",
}


def test_every_command_of_the_contract_is_there(cli):
    for group, commands in CONTRACT.items():
        for command in commands.split():
            ran = cli(*group.split(), command, "--help")
            assert (ran.exit_code, ran.stderr) == (0, ""), (group, command)
            assert {*OPTIONS.get(command, "").split()} <= {*re.findall(r"[\w-]+", ran.stdout)}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], []),
        (["jobs", "list", "--output", "json"], ["--output", "json", "jobs", "list"]),
        (["jobs", "--url=x", "list", "--token", "t"], ["--url=x", "--token", "t", "jobs", "list"]),
        (["append", "--", "--output", "json"], ["append", "--", "--output", "json"]),
        (["jobs", "--output"], ["--output", "jobs"]),
    ],
)
def test_global_options_may_stand_anywhere(given, wanted):
    assert hoisted(given) == wanted


def test_wants_json():
    assert wants_json(["--output", "json", "x"])
    assert wants_json(["--output=json"])
    assert not wants_json([])
    assert not wants_json(["--output", "table", "json"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["databases", "show"],
        ["databases", "show", "no-slash"],
        ["databases", "show", "UPPER/case"],
        ["databases", "create", "acme/events", "--engine", "mysql"],
        ["jobs", "list", "--state", "asleep"],
        ["jobs", "list", "--kind", "daydream"],
        ["jobs", "list", "--tenant", "../x"],
        ["jobs", "show", "../../metrics"],
        ["jobs", "cancel", "a\nb"],
        ["jobs", "explain", ""],
        ["approvals", "approve", "../x"],
        ["snapshots", "delete", "acme/events", "../../orders"],
        ["snapshots", "create", "acme/events", ".."],
        ["fork", "acme/events", "Copy"],
        ["fork", "acme/events", "copy", "--tenant", "../x"],
        ["flags", "show", "acme/.."],
        ["quota", "show", ".."],
        ["quota", "set", "..", "--limit", "1"],
        ["restore", "acme/events", "-o", "copy.db", "--generation", "0"],
        ["--output", "xml", "jobs", "list"],
        ["--url", "nonsense", "jobs", "list"],
        ["--url", "http://127.0.0.1:99999", "jobs", "list"],
        ["--token", "", "jobs", "list"],
        ["--token", "a\nb", "jobs", "list"],
        ["--token", "ü", "jobs", "list"],
        ["checkpoint", "acme/events", "--reason", "no text: \udcff"],
        ["tokens", "hash", "\udcff"],
        ["janitor", "--max-age", "1e400"],
        ["records", "acme/events", "--format", "single", "--follow"],
        ["append", "acme/events", "--nonsense"],
    ],
)
def test_wrong_usage_is_2(cli, api, arguments):
    ran = cli(*arguments)
    assert ran.exit_code == 2
    assert ran.stderr.startswith("Error: ")
    assert api.requests == []


def test_a_token_that_cannot_be_sent_is_not_shown(cli):
    ran = cli("--token", "se\ncret", "jobs", "list")
    assert ran.exit_code == 2
    assert "cret" not in ran.stderr


def test_wrong_usage_is_told_without_the_librarys_own_words(cli):
    assert "Value error" not in cli("--output", "xml", "jobs", "list").stderr


def test_every_kind_of_job_can_be_listed():
    assert get_args(Kind) == get_args(JobKind)


def test_wrong_usage_as_json(cli):
    ran = cli("databases", "show", "--output", "json")
    assert ran.exit_code == 2
    assert ran.problem["code"] == "wrong_usage"
    assert "TENANT/DATABASE" in ran.problem["detail"]
    assert ran.stdout == ""


def test_a_problem_is_a_sentence_with_what_to_do(cli):
    ran = cli("databases", "show", "acme/events")
    assert ran.exit_code == 1
    assert ran.stderr.startswith("Error: There is no acme/events.\n")
    assert "databases create" in ran.stderr
    problem = cli.json("databases", "show", "acme/events").problem
    assert (problem["code"], problem["status"]) == ("database_not_found", 404)
    assert problem["request_id"] == "r1"


def test_the_services_own_hint_gives_way_to_the_commands(cli, api):
    assert set(API_HINTS) == set(HINTS)
    said = f"There is no acme/events. {API_HINTS['database_not_found']}"
    api._before = [lambda request: problem(404, "database_not_found", detail=said)]
    lines = cli("databases", "show", "acme/events").stderr.splitlines()
    assert lines == ["Error: There is no acme/events.", HINTS["database_not_found"]]


def test_another_service_is_told_as_such(cli, api):
    page = "<html>\n<body>\x1b[31mnginx</body></html>"
    api._before = [lambda request: httpx.Response(502, html=page, request=request)]
    ran = cli("databases", "show", "acme/events")
    assert ran.exit_code == 1
    assert ran.stderr == (
        "Error: What answered is no bop-checkpoint service: 502 Bad Gateway.\n"
        "See --url or BOP_URL; perhaps a proxy is in between.\n"
    )


def test_token_and_url_come_from_the_environment_too(cli, api):
    api.token = "secret"
    api.add_database("acme", "events")
    assert cli("databases", "list", "acme").exit_code == 1
    assert "BOP_TOKEN" in cli("databases", "list", "acme").stderr
    assert cli("databases", "list", "acme", "--token", "secret").exit_code == 0
    env = {"BOP_TOKEN": "secret", "BOP_URL": "http://elsewhere:99"}
    assert cli("databases", "list", "acme", env=env).exit_code == 0
    assert api.requests[-1].url.netloc == b"elsewhere:99"


def test_unreachable_names_the_url_and_how_to_start(cli, api):
    def refuse(request):
        raise httpx.ConnectError("connection refused", request=request)

    api._before = [refuse] * 10
    ran = cli.json("jobs", "list")
    assert ran.exit_code == 1
    assert ran.problem["code"] == "unreachable"
    assert ran.problem["url"] == "http://127.0.0.1:8600"
    assert "serve" in ran.problem["hint"]


def test_version(cli, monkeypatch):
    """Also where the code is there without its metadata, as in the image."""
    monkeypatch.setattr("importlib.metadata.version", None)
    assert cli("--version").stdout == f"bop-checkpoint {__version__}\n"


def test_there_is_one_version():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((REPOSITORY / "helm" / "bop-checkpoint" / "Chart.yaml").read_text())
    assert project["version"] == __version__ == chart["appVersion"]
