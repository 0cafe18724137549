"""A folder in shared memory for each test."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mosel-test-", dir="/dev/shm") as folder:
        yield Path(folder)
