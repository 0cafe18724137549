"""A folder in shared memory for each test, an arena in it and a reader that has it open."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mosel.transport import Reader, SharedMemoryArena
from mosel.transport.layout import MIB
from tests.mosel.transport.device_link import Link, linked
from tests.mosel.transport.support import SETTING


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mosel-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def arena(shm: Path) -> Iterator[SharedMemoryArena]:
    with SharedMemoryArena(shm, MIB, SETTING) as arena:
        yield arena


@pytest.fixture
def reader(shm: Path, arena: SharedMemoryArena) -> Iterator[Reader]:
    with Reader(shm) as reader:
        reader.open(arena.announcement().arena)
        yield reader


@pytest.fixture
def link(shm: Path) -> Iterator[Link]:
    with linked(shm) as link:
        yield link
