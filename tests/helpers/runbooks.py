"""The commands of a runbook, as they stand on its page, to be run against a live service."""

import asyncio
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.launch import base_environment
from tests.helpers.server import ServerProcess

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = REPOSITORY / "docs" / "runbooks"
_FENCE = re.compile(r"^```sh(?: (?P<note>\S+))?\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^## (?P<title>.+)$", re.MULTILINE)
_COMMAND_SECONDS = 90.0


def pages() -> frozenset[str]:
    return frozenset(path.stem for path in PAGES.glob("*.md")) - {"README"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Commands under one heading. `note` is what stands behind ```sh: `as=second` for another
    person's commands, `stopped` for those that want the service stopped.
    """

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


@dataclass(kw_only=True)
class Operator:
    """Someone on call who goes down a page, block by block, with a shell and their own token."""

    page: str
    server: ServerProcess
    token: str
    second_token: str
    work: Path
    variables: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.left = blocks_of(self.page)
        self._block: Block | None = None

    async def next(self, *, fails: bool = False, **variables: str) -> str:
        """What the page's next block says, on both outputs; `variables` hold from here on. The
        first command that fails ends a block, and that is an error unless it `fails`.
        """
        assert self.left, f"{self.page} has no further block"
        self._block = self.left.pop(0)
        self.variables |= variables
        return await self.again(fails=fails)

    async def again(self, *, fails: bool = False) -> str:
        """The block that was run last, once more."""
        assert self._block is not None
        token = self.token
        match self._block.note:
            case "stopped":
                assert not self.server.is_running, "the page has the service stopped first"
            case "as=second":
                token = self.second_token
            case note:
                assert note is None, f"a note that is none: {note}"
        return await self._shell(self._block.commands, token=token, fails=fails)

    async def _shell(self, commands: str, *, token: str, fails: bool) -> str:
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        environment: Mapping[str, str] = {
            **base_environment(),
            "PATH": path,
            "COLUMNS": "200",
            "BOP_URL": self.server.base_url,
            "BOP_TOKEN": token,
            "BOP_DATA_DIR": str(self.server.data_dir),
            **self.variables,
        }
        ran = await asyncio.create_subprocess_exec(
            "bash", "-euo", "pipefail", "-c", commands,
            cwd=self.work, env=environment, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            async with asyncio.timeout(_COMMAND_SECONDS):
                told = (await ran.communicate())[0].decode()
        finally:
            if ran.returncode is None:
                ran.kill()
        print(f"$ {commands}{told}")  # pytest shows it where the test failed
        assert (ran.returncode != 0) == fails, f"exit {ran.returncode} of {commands}\n{told}"
        return told
