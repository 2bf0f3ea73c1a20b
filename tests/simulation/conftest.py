"""Where a seed lives."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """In memory, where there is such a place: no fsync is waited for."""
    memory = Path("/dev/shm")
    return (memory if memory.is_dir() else tmp_path) / f"bop-sim-{os.getpid()}"
