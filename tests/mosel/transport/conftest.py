"""A folder in shared memory for each test, an arena in it and a reader that has it open."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mosel.transport import Reader, SharedMemoryArena
from mosel.transport.layout import MIB
from mosel.transport.object_arena import ObjectArena
from tests.mosel.transport.support import SETTING, AnyArena

if TYPE_CHECKING:
    from tests.mosel.transport.device_link import Link


@pytest.fixture
def shm() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mosel-test-", dir="/dev/shm") as folder:
        yield Path(folder)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__annotations__.get("arena") == AnyArena:
        metafunc.parametrize("arena", ["posix_shm", "in_process"], indirect=True)


@pytest.fixture
def arena(shm: Path, request: pytest.FixtureRequest) -> Iterator[AnyArena]:
    in_process = getattr(request, "param", "posix_shm") == "in_process"
    with ObjectArena(MIB, SETTING) if in_process else SharedMemoryArena(shm, MIB, SETTING) as arena:
        yield arena


@pytest.fixture
def reader(shm: Path, arena: AnyArena) -> Iterator[Reader]:
    with Reader(shm) as reader:
        reader.open(arena.announcement().arena)
        yield reader


@pytest.fixture
def link(shm: Path) -> "Iterator[Link]":
    # Not above: the tests of host memory run where there is no torch.
    from tests.mosel.transport.device_link import linked

    with linked(shm) as link:
        yield link
