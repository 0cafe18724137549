"""Connections between hosts: who is gone without a word is noticed, who is merely busy is not cut off."""

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import pytest

from mosel.config import Settings
from mosel.runtime.channels import open_channel
from mosel.runtime.service import Context, Service

# Longer than a silent peer is waited for.
BUSY_S = 9


def busy(process: Connection, run_dir: str) -> None:
    """A service in a process of its own, which does what it is told for a while, and then answers."""

    async def call(request: bytes, context: Context) -> bytes:
        if request == b"hold the lock of Python":
            # Unlike CDLL, which gives it back.
            ctypes.PyDLL(None).sleep(BUSY_S)
        elif request == b"hold the loop":
            time.sleep(BUSY_S)  # noqa: ASYNC251 (on purpose)
        else:
            await asyncio.sleep(BUSY_S)
        return request

    async def serve() -> None:
        methods: dict[str, Any] = {"Call": grpc.unary_unary_rpc_method_handler(call)}

        def register(server: grpc.aio.Server) -> None:
            server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test.Busy", methods)])

        async with Service(Settings(run_dir=Path(run_dir)), "127.0.0.1:0", "test", register) as service:
            process.send(service.address)
            await asyncio.Event().wait()

    asyncio.run(serve())


@contextlib.contextmanager
def serving(tmp_path: Path) -> Iterator[tuple[int, Connection]]:
    """Its process id, and what its address comes from."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=busy, args=(there, str(tmp_path)))
    process.start()
    try:
        assert process.pid is not None
        yield process.pid, here
    finally:
        process.kill()
        process.join()


@pytest.fixture
def services(tmp_path: Path) -> Iterator[list[tuple[int, str]]]:
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(serving(tmp_path)) for _ in range(4)]
        yield [(pid, address.recv()) for pid, address in started]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(run_dir=tmp_path)


async def test_who_is_busy_is_waited_for_and_who_is_gone_is_not(
    services: list[tuple[int, str]], settings: Settings
) -> None:
    requests = [b"hold the lock of Python", b"hold the loop", b"wait", b"be gone"]
    async with contextlib.AsyncExitStack() as stack:
        calls = []
        for request, (_, address) in zip(requests, services, strict=True):
            channel = await stack.enter_async_context(open_channel(settings, address))
            await channel.channel_ready()
            call: Any = channel.unary_unary("/test.Busy/Call")
            calls.append(asyncio.ensure_future(call(request, timeout=60)))
        await asyncio.sleep(0.5)
        os.kill(services[-1][0], signal.SIGSTOP)
        assert [await call for call in calls[:-1]] == requests[:-1]
        with pytest.raises(grpc.aio.AioRpcError) as gone:
            await calls[-1]
    assert gone.value.code() is grpc.StatusCode.UNAVAILABLE
