"""A network namespace of its own for the calling thread, with rules of nftables in it.

Sockets that the thread opens, and processes that it starts, are in there; what was open before
stays where it was. Needs root.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_TABLE = "inet faults"


def is_available() -> bool:
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("nft", "ip", "unshare")):
        return False
    probe = ["unshare", "--net", "nft", "add", "table", "inet", "probe"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@contextmanager
def network_namespace() -> Iterator[None]:
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _checked(_libc.unshare(_CLONE_NEWNET))
        try:
            _run("ip", "link", "set", "lo", "up")
            yield
        finally:
            _checked(_libc.setns(before, _CLONE_NEWNET))
    finally:
        os.close(before)


@contextmanager
def answers_dropped(port: int) -> Iterator[None]:
    """A partition in one direction: connections to the port are made and what is sent arrives, but
    nothing that its server says comes back.
    """
    rule = f"tcp sport {port} tcp flags & (syn | ack) == ack drop"
    with _rules(f"chain out {{ type filter hook output priority 0; {rule}; }}"):
        yield


@contextmanager
def requests_dropped(port: int) -> Iterator[None]:
    """The server is reached by nobody, and nobody is told."""
    with _rules(f"chain out {{ type filter hook output priority 0; tcp dport {port} drop; }}"):
        yield


@contextmanager
def _rules(chain: str) -> Iterator[None]:
    _run("nft", f"table {_TABLE} {{ {chain}; }}")
    try:
        yield
    finally:
        _run("nft", "delete", "table", *_TABLE.split())


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def _checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
