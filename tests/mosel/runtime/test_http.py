"""An HTTP port that cannot be had; what it does otherwise is tested where it is used."""

import socket

import pytest
from starlette.applications import Starlette

from mosel.errors import ConfigError
from mosel.runtime.http import HttpServer


async def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refused:
            async with HttpServer(Starlette(), "127.0.0.1", port, "--http-port", 1):
                pass
    assert str(refused.value) == f"--http-port: cannot listen on 127.0.0.1:{port}: Address already in use"
