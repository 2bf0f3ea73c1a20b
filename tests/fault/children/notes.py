"""How a child under the power-cut recorder tells the world what it tried and what it was told.

A note is one write, so that it has one moment among the child's system calls.
"""

import json
import os
from pathlib import Path

ROOT = Path(os.environ["POWERCUT_ROOT"])
_fd = os.open(os.environ["POWERCUT_NOTES"], os.O_WRONLY | os.O_APPEND)


def note(**value: object) -> None:
    os.write(_fd, json.dumps(value).encode() + b"\n")
