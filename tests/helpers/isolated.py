"""An async function run in a process of its own: damaged files may take the process down.

with Isolated("tests.fault.children.manifest_recovery:recover") as recover:
    state = recover(directory)
"""

import asyncio
import importlib
import os
import pickle
import signal
import struct
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

_LENGTH = struct.Struct("<Q")
REPOSITORY = Path(__file__).resolve().parents[2]


class IsolatedFailure(AssertionError):
    """The function raised, or its process died."""


class Isolated:
    """`target` is `module:function`; its arguments and its result must pickle. A process that
    died is replaced at the next call.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def __call__(self, *arguments: Any) -> Any:
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        _send(process.stdin, arguments)
        answer = _receive(process.stdout)
        if answer is None:
            code = process.wait()
            self._end()
            died = signal.Signals(-code).name if code < 0 else f"exit {code}"
            raise IsolatedFailure(f"the process died: {died}")
        match answer:
            case ("ok", result):
                return result
            case (_, text):
                raise IsolatedFailure(text)

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.isolated", self._target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
        )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.wait()


def _send(pipe: BinaryIO, value: object) -> None:
    data = pickle.dumps(value)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> Any:
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    data = pipe.read(_LENGTH.unpack(head)[0])
    return pickle.loads(data)


def _serve(target: str) -> None:
    module, name = target.split(":")
    function = getattr(importlib.import_module(module), name)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints goes to stderr
    while (arguments := _receive(source)) is not None:
        try:
            answer = ("ok", asyncio.run(function(*arguments)))
        except Exception:  # noqa: BLE001 - told to the caller
            answer = ("failed", traceback.format_exc(limit=-4))
        _send(sink, answer)


if __name__ == "__main__":
    _serve(sys.argv[1])
