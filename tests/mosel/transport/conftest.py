"""A folder in shared memory for each test, an arena in it and a reader that has it open."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mosel.transport import Reader, SharedMemoryArena
from mosel.transport.layout import MIB
from tests.mosel.transport.support import SETTING

if TYPE_CHECKING:
    from tests.mosel.transport.device_link import Link


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
def link(shm: Path) -> "Iterator[Link]":
    # Not above: the tests of host memory run where there is no torch.
    from tests.mosel.transport.device_link import linked

    with linked(shm) as link:
        yield link
