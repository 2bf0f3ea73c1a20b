"""What this process holds open."""

from contextlib import suppress
from pathlib import Path


def open_files_below(root: Path) -> list[str]:
    found: list[str] = []
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.append(str(fd.readlink()))
    return [name for name in found if name.startswith(f"{root}/")]
