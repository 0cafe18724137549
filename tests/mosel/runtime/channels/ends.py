"""Both ends of calls: handlers that a test writes, behind a channel of either kind."""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue, Int64Value

from mosel.runtime.in_process import InProcessChannel, InProcessServer, LocalServices

KINDS = ("in_process", "unix_socket")
SOON_S = 0.2
LATE_S = 60.0
Server = grpc.aio.Server | InProcessServer
Options = Sequence[tuple[str, int]]
_CODEC: dict[str, Any] = {
    "request_deserializer": Int64Value.FromString,
    "response_serializer": BytesValue.SerializeToString,
}
# A channel tries again at once.
_SOON = (("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 50))


class Ends(grpc.GenericRpcHandler):
    """An address, the handlers behind it, and a channel to it. Requests are numbers, replies are bytes.

    Each decorator takes a handler, and gives what a stub has to call it.
    """

    def __init__(self, kind: str, folder: Path, channel_options: Options = ()) -> None:
        self.kind, self.address = kind, f"unix:{folder}/service.sock"
        self.services = LocalServices()
        self._handlers: dict[str, Any] = {}
        options = [*_SOON, *channel_options]
        self.channel: Any = (
            InProcessChannel(self.address, options, self.services)
            if kind == "in_process"
            else grpc.aio.insecure_channel(self.address, options)
        )

    @asynccontextmanager
    async def served(
        self, options: Options = (), interceptors: Sequence[grpc.aio.ServerInterceptor] = ()
    ) -> AsyncIterator[Server]:
        """Inside, the address is served."""
        server: Server
        if self.kind == "in_process":
            server = InProcessServer(self.address, options, interceptors, self.services)
        else:
            server = grpc.aio.server(options=options, interceptors=interceptors)
            server.add_insecure_port(self.address)
        server.add_generic_rpc_handlers((self,))
        await server.start()
        try:
            yield server
        finally:
            await server.stop(None)

    def service(self, handler_call_details: Any) -> Any:
        return self._handlers.get(handler_call_details.method)

    def unary_unary(self, handler: Callable[..., Any]) -> Any:
        return self._add("unary_unary", grpc.unary_unary_rpc_method_handler(handler, **_CODEC))

    def unary_stream(self, handler: Callable[..., Any]) -> Any:
        return self._add("unary_stream", grpc.unary_stream_rpc_method_handler(handler, **_CODEC))

    def stream_unary(self, handler: Callable[..., Any]) -> Any:
        return self._add("stream_unary", grpc.stream_unary_rpc_method_handler(handler, **_CODEC))

    def stream_stream(self, handler: Callable[..., Any]) -> Any:
        return self._add("stream_stream", grpc.stream_stream_rpc_method_handler(handler, **_CODEC))

    def takes_bytes(self, handler: Callable[..., Any]) -> Any:
        """As `stream_unary`, for requests and replies that are bytes."""
        name = f"/test.Ends/{len(self._handlers)}"
        self._handlers[name] = grpc.stream_unary_rpc_method_handler(handler)
        return self.channel.stream_unary(name)

    def method(self, kind: str, name: str) -> Any:
        """A method of a stub."""
        return getattr(self.channel, kind)(
            name, request_serializer=Int64Value.SerializeToString, response_deserializer=BytesValue.FromString
        )

    def _add(self, kind: str, handler: Any) -> Any:
        name = f"/test.Ends/{len(self._handlers)}"
        self._handlers[name] = handler
        return self.method(kind, name)


@asynccontextmanager
async def open_ends(kind: str, channel_options: Options = ()) -> AsyncIterator[Ends]:
    """Both ends; nothing is served yet."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        ends = Ends(kind, Path(folder), channel_options)
        try:
            yield ends
        finally:
            await ends.channel.close()


def number(value: int) -> Int64Value:
    return Int64Value(value=value)


def data(value: bytes) -> BytesValue:
    return BytesValue(value=value)


async def hang(happened: asyncio.Event, cancelled: asyncio.Event) -> None:
    """Says that it has begun, and that it was cancelled, which is all that ends it."""
    happened.set()
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        cancelled.set()
        raise


async def failure_of(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value


async def soon(event: asyncio.Event) -> None:
    async with asyncio.timeout(LATE_S):
        await event.wait()
