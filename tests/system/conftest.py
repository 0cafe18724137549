"""What tests of `mosel up` share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def private() -> Iterator[dict[str, str]]:
    """Environment variables that give a command folders of its own, for sockets and for shared memory."""
    shared_memory = Path(tempfile.mkdtemp(prefix="mosel-test-", dir="/dev/shm"))
    sockets = Path(tempfile.mkdtemp(prefix="mt-"))
    environment = {
        "COLUMNS": "200",
        "MOSEL_TRANSPORT__SHM_DIR": str(shared_memory),
        "MOSEL_TRANSPORT__GATEWAY_ARENA_MIB": "16",
        "MOSEL_TRANSPORT__ENCODER_ARENA_MIB": "16",
        "XDG_RUNTIME_DIR": str(sockets),
    }
    yield environment
    shutil.rmtree(shared_memory)
    shutil.rmtree(sockets)
