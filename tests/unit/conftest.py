"""Unit tests use no network: sockets other than AF_UNIX (the event loop's own) are refused."""

from collections.abc import Iterator

import pytest
import pytest_socket
from hypothesis import Phase, settings

settings.register_profile("unit", deadline=None)  # how fast is no unit test's question
settings.register_profile(  # docs/mutation.md: only whether it fails, and the same in any order
    "mutation", deadline=None, database=None, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def _offline() -> Iterator[None]:
    pytest_socket.disable_socket(allow_unix_socket=True)
    yield
    pytest_socket.enable_socket()
