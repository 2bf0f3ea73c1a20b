"""Ports for servers under test, never the same one twice on this machine.

All lie below 32768, where Linux takes no source ports from, and leave `port + 10000` free too,
which SeaweedFS takes for gRPC.
"""

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

_FIRST, _END = 20000, 32000
_held: list[int] = []


def free_port() -> int:
    """Reserved for this process: a lock file keeps the other test processes from it."""
    order = random.Random(f"{os.getpid()}/{len(_held)}").sample(range(_FIRST, _END), 500)
    for port in order:
        if _reserve(port):
            if _is_free(port) and _is_free(port + 10000):
                return port
            os.close(_held.pop())
    raise RuntimeError("no free port found")


def _reserve(port: int) -> bool:
    directory = Path(tempfile.gettempdir()) / f"bop-test-ports-{os.getuid()}"
    directory.mkdir(exist_ok=True)
    fd = os.open(directory / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    _held.append(fd)
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
