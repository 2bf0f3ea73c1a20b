"""Real servers for integration tests."""

from collections.abc import Iterator

import pytest

from tests.helpers.seaweed import SeaweedS3


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    """One SeaweedFS per test worker; take a bucket of your own with `seaweed.bucket()`."""
    with SeaweedS3.running(tmp_path_factory.mktemp("seaweed") / "server") as server:
        yield server
