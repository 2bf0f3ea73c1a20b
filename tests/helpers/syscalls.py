"""The system calls that change a directory tree, as strace saw a real process make them.

strace prints every string in hexadecimal (`-xx`) and each descriptor with its path (`-y`), so a
line parses without guessing. A call has the line it began on and the line it ended on; a thread
is let go only after its line is printed, so the order of lines respects cause and effect. A close
counts from its beginning: the kernel frees the number before the call returns.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CALLS = (
    "openat,open,creat,close,dup,dup2,dup3,lseek,write,writev,pwrite64,pwritev,pwritev2,"
    "ftruncate,truncate,fallocate,copy_file_range,sendfile,mmap,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,"
    "mkdir,mkdirat,rmdir,chdir,fchdir,fsync,fdatasync,sync_file_range,sync,syncfs"
)
_STRING_BYTES_MAX = 1 << 26

_LINE = re.compile(r"(\d+) +(?:(\w+)\((.*)|<\.\.\. (\w+) resumed>(.*))$")
_UNFINISHED = " <unfinished ...>"
_RESULT = re.compile(r"^(.*)\) += (-?\d+|\?|0x[0-9a-f]+)(?:<([^>]*)>)?(.*)$")
_BYTES = re.compile(r"\\x([0-9a-f]{2})")


class StraceFailed(RuntimeError):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    name: str
    arguments: tuple[str, ...]
    result: int
    result_path: str | None
    began: int
    ended: int


def is_available() -> bool:
    return shutil.which("strace") is not None


def trace(
    command: Sequence[str], *, environment: Mapping[str, str], cwd: Path, into: Path
) -> list[Call]:
    """Runs `command` to its end under strace and gives its calls in the order they ended.

    Raises StraceFailed if the command fails.
    """
    done = subprocess.run(
        ["strace", "--follow-forks", "--seccomp-bpf", "-qq", "-xx", "-v", "-y",
         "-s", str(_STRING_BYTES_MAX), "-e", "signal=none", "-e", f"trace={CALLS}",
         "-o", str(into), *command],
        env=dict(environment), cwd=cwd, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise StraceFailed(f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    with into.open(encoding="ascii") as lines:
        return list(parse(lines))


def parse(lines: Iterator[str]) -> Iterator[Call]:
    unfinished: dict[str, tuple[int, str, str]] = {}
    for number, line in enumerate(lines):
        matched = _LINE.match(line.rstrip("\n"))
        if matched is None:
            if "+++" in line or "---" in line:
                continue
            raise StraceFailed(f"line {number} is not understood: {line[:200]!r}")
        thread, name, head, resumed, tail = matched.groups()
        if name is not None and head.endswith(_UNFINISHED):
            head = head.removesuffix(_UNFINISHED)
            unfinished[thread] = (number, name, head)
            if name == "close":  # its number is free at once: another thread may be given it
                yield Call(
                    name=name, arguments=tuple(_split(head.removesuffix(")"))), result=0,
                    result_path=None, began=number, ended=number,
                )  # fmt: skip
            continue
        began = number
        if resumed is not None:
            began, name, head = unfinished.pop(thread)
            if name != resumed:
                raise StraceFailed(f"line {number} resumes {resumed}, {name} was begun")
            head += tail
            if name == "close":
                continue
        ended = _RESULT.match(head)
        if ended is None or ended[2] == "?":
            continue  # the process ended inside the call
        yield Call(
            name=name,
            arguments=tuple(_split(ended[1])),
            result=int(ended[2], 0),
            result_path=None if ended[3] is None else text(ended[3]),
            began=began,
            ended=number,
        )


def text(hexadecimal: str) -> str:
    return data(hexadecimal).decode()


def data(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal.replace("\\x", ""))


def quoted(argument: str) -> bytes:
    """The bytes of one string argument."""
    if not (argument.startswith('"') and argument.endswith('"')):
        raise StraceFailed(f"not a whole string: {argument[:80]!r}")
    return data(argument[1:-1])


def vector(argument: str) -> bytes:
    """The bytes of an array of iovecs, put together."""
    return b"".join(data(piece) for piece in re.findall(r'iov_base="([^"]*)"', argument))


def descriptor(argument: str) -> tuple[int, str]:
    """Number and path of `5<\\x2f…>`; the path is empty where the kernel knows none."""
    number, _, rest = argument.partition("<")
    path = rest.partition(">")[0]
    return int(number), text(path) if path.startswith("\\x2f") else ""


def _split(arguments: str) -> Iterator[str]:
    """At the commas outside brackets; strings and paths are hexadecimal and hold none."""
    depth, start = 0, 0
    for place in (found.start() for found in re.finditer(r"[\[\]{},]", arguments)):
        match arguments[place]:
            case "[" | "{":
                depth += 1
            case "]" | "}":
                depth -= 1
            case _ if depth == 0:
                yield arguments[start:place].strip()
                start = place + 1
    if arguments[start:].strip():
        yield arguments[start:].strip()
