"""A process that has imported the service and forks one per request: `tests.helpers.launch`.

It opens nothing, starts no thread and no event loop before it forks. Requests are JSON lines on
stdin; answers (`{"id", "pid"}`) and exits (`{"exit": pid, "code"}`) are JSON lines on stdout.
When stdin closes or this process dies, so do its children.
"""

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import sys
import time
from pathlib import Path
from typing import Any

_PRELOADED = (
    "app.cli.main",
    "app.main",
    "app.container",
    "uvicorn",
    "uvicorn.lifespan.on",
    "uvicorn.protocols.http.httptools_impl",
    "uvloop",
)
_PR_SET_PDEATHSIG = 1


def preload() -> None:
    for module in _PRELOADED:
        importlib.import_module(module)
    threads = list(Path("/proc/self/task").iterdir())
    if len(threads) > 1:
        raise RuntimeError(f"importing the service started threads: {threads}")
    gc.collect()
    gc.freeze()


def fork_on_request() -> dict[str, Any] | None:
    """Returns the request in each forked child, and None in the zygote at its end."""
    requests, answers = os.dup(0), os.dup(1)
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    children: set[int] = set()
    buffer = b""
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        os.write(answers, b'{"ready": true}\n')
        while True:
            for key, _ in selector.select():
                data = os.read(key.fd, 1 << 16)
                if key.fd == wake_read:
                    _reap(children, answers)
                    continue
                if not data:
                    for pid in children:
                        os.kill(pid, signal.SIGKILL)
                    return None
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    request = json.loads(line)
                    parent = os.getpid()
                    pid = os.fork()
                    if pid == 0:
                        signal.set_wakeup_fd(-1)
                        for fd in (requests, answers, wake_read, wake_write):
                            os.close(fd)
                        _become(request, parent)
                        return request
                    children.add(pid)
                    answer = {"id": request["id"], "pid": pid}
                    os.write(answers, json.dumps(answer).encode() + b"\n")


def _reap(children: set[int], answers: int) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            children.discard(pid)
            exit_line = {"exit": pid, "code": os.waitstatus_to_exitcode(status)}
            os.write(answers, json.dumps(exit_line).encode() + b"\n")


def _become(request: dict[str, Any], parent: int) -> None:
    """A process as if started anew: its own session, environment, output and arguments."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.close(null)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv = ["bop-checkpoint", *request["arguments"]]
    importlib.import_module("bop_failpoints").configure(os.environ)


if __name__ == "__main__":
    preload()
    if fork_on_request() is not None:
        importlib.import_module("app.cli.main").main()
