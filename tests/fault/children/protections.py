"""Takes one protection away from this process, so that a test can show it would be missed."""

import os
import stat
from typing import Any

import lmdb


def take_away(protection: str) -> None:
    """`metasync`, `sync`: LMDB opened without it · `fdatasync`: Python's does nothing ·
    `directory`: directories are not fsynced · `none`.
    """
    real_open, real_fsync = lmdb.open, os.fsync
    match protection:
        case "metasync" | "sync":

            def careless_open(*arguments: Any, **options: Any) -> lmdb.Environment:
                return real_open(*arguments, **{**options, protection: False})

            lmdb.open = careless_open
        case "fdatasync":
            os.fdatasync = lambda fd: None
        case "directory":

            def files_only(fd: int) -> None:
                if not stat.S_ISDIR(os.fstat(fd).st_mode):
                    real_fsync(fd)

            os.fsync = files_only
        case "none":
            pass
        case _:
            raise ValueError(protection)
