"""An HTTP port: had, or not; what it does otherwise is tested where it is used."""

import signal
import socket

import httpx
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


async def test_it_answers_at_once_leaves_signals_alone_and_gives_the_port_back() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    async with HttpServer(Starlette(), "127.0.0.1", 0, "--http-port", 1) as server:
        async with httpx.AsyncClient(timeout=30) as client:
            reply = await client.get(f"http://127.0.0.1:{server.port}/")
        assert (reply.status_code, "server" in reply.headers, "date" in reply.headers) == (404, False, True)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", server.port))


async def test_it_may_end_before_it_began() -> None:
    async with HttpServer(Starlette(), "127.0.0.1", 0, "--http-port", 1):
        pass
