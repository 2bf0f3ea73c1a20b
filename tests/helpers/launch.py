"""Two ways to start the service's command line: a new interpreter, or a fork of a warm one."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tests.helpers.failpoints import FAILPOINTS_PATH

REPOSITORY = Path(__file__).resolve().parents[2]
_START_SECONDS = 60.0


def base_environment() -> dict[str, str]:
    """What a process under test inherits: nothing of the service's own settings."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name in kept or name.startswith(("COV_", "COVERAGE_"))
    }
    path = os.pathsep.join((str(REPOSITORY), str(FAILPOINTS_PATH)))
    return {**inherited, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}


class Launched(Protocol):
    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        ...


class Launcher(Protocol):
    def launch(
        self, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path, cwd: Path
    ) -> Launched: ...


class NewInterpreter:
    """As a user starts it. Takes seconds of CPU for imports. `command_prefix` may be strace."""

    def __init__(self, *command_prefix: str, module: str = "app.cli.main") -> None:
        self._prefix = command_prefix
        self._module = module

    def launch(
        self, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path, cwd: Path
    ) -> Launched:
        with log.open("ab") as output:
            return subprocess.Popen(
                [*self._prefix, sys.executable, "-m", self._module, *arguments],
                env={**base_environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                start_new_session=True,
            )


class _Forked:
    def __init__(self, pid: int, exits: Mapping[int, int], zygote: "subprocess.Popen[bytes]"):
        self._pid = pid
        self._exits = exits
        self._zygote = zygote

    @property
    def pid(self) -> int:
        return self._pid

    def poll(self) -> int | None:
        if self._pid not in self._exits and self._zygote.poll() is not None:
            return -9  # its parent's death is its own
        return self._exits.get(self._pid)


class ForkServer:
    """A zygote that has imported the service; each launch is a fork, in milliseconds."""

    def __init__(self) -> None:
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.zygote"],
            env=base_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        self._exits: dict[int, int] = {}
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._requests = 0
        self._reader = threading.Thread(target=self._read, name="fork-server", daemon=True)
        self._reader.start()
        try:
            self._next_answer()  # it is warm
        except BaseException:
            self.close()
            raise

    def launch(
        self, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path, cwd: Path
    ) -> Launched:
        with self._lock:
            self._requests += 1
            request = {
                "id": self._requests,
                "arguments": list(arguments),
                "environment": {**base_environment(), **environment},
                "log": os.fspath(log),
                "cwd": os.fspath(cwd),
            }
            assert self._zygote.stdin is not None
            self._zygote.stdin.write(json.dumps(request).encode() + b"\n")
            self._zygote.stdin.flush()
            answer = self._next_answer()
            assert answer["id"] == self._requests
            return _Forked(answer["pid"], self._exits, self._zygote)

    def close(self) -> None:
        """Kills what still runs of its children, and ends."""
        assert self._zygote.stdin is not None
        assert self._zygote.stdout is not None
        self._zygote.stdin.close()
        self._zygote.wait(timeout=30)
        self._reader.join(30)
        self._zygote.stdout.close()

    def _next_answer(self) -> dict[str, Any]:
        answer = self._answers.get(timeout=_START_SECONDS)
        if answer is None:
            raise RuntimeError(f"the fork server ended with code {self._zygote.wait()}")
        return answer

    def _read(self) -> None:
        assert self._zygote.stdout is not None
        for line in self._zygote.stdout:
            told = json.loads(line)
            if "exit" in told:
                self._exits[told["exit"]] = told["code"]
            else:
                self._answers.put(told)
        self._answers.put(None)
