"""The commands of a runbook, as they stand on its page, to be run against a live service."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.launch import base_environment

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = REPOSITORY / "docs" / "runbooks"
_FENCE = re.compile(r"^```sh(?: (?P<note>\S+))?\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^## (?P<title>.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Commands under one heading. `note` is what stands behind ```sh: who runs it, or when."""

    heading: str
    note: str | None
    commands: str


def blocks_of(page: str) -> list[Block]:
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    headings = [(match.start(), match["title"]) for match in _HEADING.finditer(text)]
    found = []
    for match in _FENCE.finditer(text):
        title = [title for at, title in headings if at < match.start()]
        found.append(
            Block(heading=title[-1] if title else "", note=match["note"], commands=match["body"])
        )
    assert found, f"{page} has no commands"
    return found


class Operator:
    """Someone with a shell: the runbook's variables, and the command on the PATH."""

    def __init__(self, work: Path, **variables: str) -> None:
        self.work = work
        self.variables: dict[str, str] = dict(variables)
        self.ran: list[Block] = []

    def run(self, block: Block, *, fails: bool = False) -> str:
        """Runs the block's commands in order; the first that fails ends it. Returns its output."""
        self.ran.append(block)
        return self.shell(block.commands, fails=fails)

    def shell(self, commands: str, *, fails: bool = False) -> str:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        environment: Mapping[str, str] = {
            **base_environment(),
            "PATH": path,
            "COLUMNS": "200",
            **self.variables,
        }
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.work, env=environment, capture_output=True, text=True, check=False, timeout=90,
        )  # fmt: skip
        assert (ran.returncode != 0) == fails, f"{commands}\n{ran.stdout}{ran.stderr}"
        return ran.stdout + ran.stderr
