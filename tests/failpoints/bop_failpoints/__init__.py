"""What failpoints do in tests. Importable only where `tests/failpoints` is on PYTHONPATH.

`BOP_FAILPOINTS` is JSON, name to rule: `{"wal.before_fsync": {"action": "kill", "nth": 2}}`.

    action       kill | raise | errno:EIO | delay:SECONDS | pause:FILE
    nth          fires at that hit only, counted from 1 (default: at every hit)
    probability  fires at a hit with this chance, drawn from `seed` and the name

`pause:FILE` makes FILE + ".reached" and waits until FILE exists; it holds up the calling thread.
`BOP_FAILPOINTS_TRACE` names a file that gets a line `name count` when a name's count of hits
reaches 1, 2, 4, 8 …: which failpoints a run reached, and about how often.
"""

import errno
import json
import os
import random
import select
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PAUSE_POLL_SECONDS = 0.005
_KEYS = {"action", "nth", "probability", "seed"}


class FailpointRaised(RuntimeError):
    """The action `raise`: an error that no code expects."""


class _Rule:
    def __init__(self, name: str, spec: Mapping[str, object]) -> None:
        if unknown := set(spec) - _KEYS:
            raise ValueError(f"failpoint {name}: unknown {sorted(unknown)}")
        self._name = name
        self._verb, _, self._argument = str(spec["action"]).partition(":")
        match self._verb:
            case "kill" | "raise":
                if self._argument:
                    raise ValueError(f"failpoint {name}: {self._verb} takes no argument")
            case "errno":
                self._errno = int(getattr(errno, self._argument))
            case "delay":
                self._seconds = float(self._argument)
            case "pause":
                self._gate = Path(self._argument)
            case _:
                raise ValueError(f"failpoint {name}: unknown action {spec['action']!r}")
        self._nth = None if spec.get("nth") is None else int(str(spec["nth"]))
        self._chance = None if spec.get("probability") is None else float(str(spec["probability"]))
        self._random = random.Random(f"{spec.get('seed', 0)}/{name}")

    def fires(self, count: int) -> bool:
        """Called once per hit, under the lock, so that the draws follow the seed."""
        if self._nth is not None and count != self._nth:
            return False
        return self._chance is None or self._random.random() < self._chance

    def act(self) -> None:
        match self._verb:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()
            case "raise":
                raise FailpointRaised(self._name)
            case "errno":
                raise OSError(self._errno, f"{os.strerror(self._errno)} (failpoint {self._name})")
            case "delay":
                time.sleep(self._seconds)
            case _:
                self._gate.with_name(self._gate.name + ".reached").touch()
                while not self._gate.exists():
                    select.select([], [], [], _PAUSE_POLL_SECONDS)  # sleeps under libfaketime, too


@dataclass
class _State:
    rules: dict[str, _Rule]
    counts: dict[str, int]
    trace_fd: int


_lock = threading.Lock()
_state = _State({}, {}, -1)


def configure(environment: Mapping[str, str]) -> None:
    """Starts anew from these variables. A forked server calls it with its own environment."""
    global _state  # noqa: PLW0603 - the package is one switchboard
    specs = json.loads(environment.get("BOP_FAILPOINTS") or "{}")
    rules = {name: _Rule(name, spec) for name, spec in specs.items()}
    trace = environment.get("BOP_FAILPOINTS_TRACE")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    fd = os.open(trace, flags, 0o600) if trace else -1
    with _lock:
        if _state.trace_fd >= 0:
            os.close(_state.trace_fd)
        _state = _State(rules, {}, fd)


def hit(name: str) -> None:
    state = _state
    if not state.rules and state.trace_fd < 0:
        return
    with _lock:
        count = state.counts.get(name, 0) + 1
        state.counts[name] = count
        if state.trace_fd >= 0 and count & (count - 1) == 0:
            os.write(state.trace_fd, f"{name} {count}\n".encode())
        rule = state.rules.get(name)
        fires = rule is not None and rule.fires(count)
    if rule is not None and fires:
        rule.act()


def hits(name: str) -> int:
    return _state.counts.get(name, 0)


configure(os.environ)
