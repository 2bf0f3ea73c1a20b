"""Unit tests use no network: sockets other than AF_UNIX (the event loop's own) are refused."""

from collections.abc import Iterator

import pytest
import pytest_socket
from hypothesis import settings

settings.register_profile("unit", deadline=None)  # how fast is no unit test's question
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def _offline() -> Iterator[None]:
    pytest_socket.disable_socket(allow_unix_socket=True)
    yield
    pytest_socket.enable_socket()
