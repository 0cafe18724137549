"""The caller's side: what stubs are made of."""

import asyncio
from collections.abc import AsyncIterable, Iterable
from functools import partialmethod
from typing import Any

import grpc

from mosel.runtime.in_process import calls
from mosel.runtime.in_process.handing_over import Deserializer, Options, Serializer, limits
from mosel.runtime.in_process.local_services import LocalServices, local_services
from mosel.runtime.in_process.rpc import CANCELLED_BY_CALLER, Rpc, Status


class InProcessChannel:
    """Stands for a `grpc.aio.Channel` to a service of the same process, which may come, go and come again.

    Args:
        address: of the service.
        options: as those of a channel; the limits of messages count.
        services: where it is found.
    """

    def __init__(self, address: str, options: Options = (), services: LocalServices = local_services) -> None:
        self.address, self.services, self.limits = address, services, limits(options)
        self.under_way: set[Rpc] = set()
        self.closed = False
        # Those that send what callers gave to iterate.
        self.senders: set[asyncio.Task[None]] = set()

    def _method(
        self,
        kind: type[Any],
        method: str,
        request_serializer: Serializer = None,
        response_deserializer: Deserializer = None,
        _registered_method: bool | None = False,
    ) -> "_MultiCallable":
        """What calls a method; arguments as generated stubs give them."""
        return _MultiCallable(self, method, request_serializer, response_deserializer, kind)

    # By how many messages go each way.
    unary_unary = partialmethod(_method, calls.UnaryUnaryCall)
    unary_stream = partialmethod(_method, calls.UnaryStreamCall)
    stream_unary = partialmethod(_method, calls.StreamUnaryCall)
    stream_stream = partialmethod(_method, calls.StreamStreamCall)

    async def __aenter__(self) -> "InProcessChannel":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Takes no more calls, and cancels those that are not over within `grace` seconds."""
        self.closed = True
        if self.under_way and grace:
            over = [asyncio.ensure_future(rpc.over()) for rpc in self.under_way]
            await asyncio.wait(over, timeout=grace)
        for rpc in list(self.under_way):
            rpc.break_off(CANCELLED_BY_CALLER)


class _MultiCallable:
    """A method of a stub."""

    def __init__(
        self,
        channel: InProcessChannel,
        method: str,
        serialize: Serializer,
        deserialize: Deserializer,
        kind: type[Any],
    ) -> None:
        self._channel, self._method, self._serialize, self._deserialize = channel, method, serialize, deserialize
        self._kind = kind
        self._streams = kind in (calls.StreamUnaryCall, calls.StreamStreamCall)
        self._streamed = kind in (calls.UnaryStreamCall, calls.StreamStreamCall)

    def __call__(
        self,
        request: Any = None,
        *,
        timeout: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
        credentials: object = None,
        wait_for_ready: bool | None = None,
        compression: object = None,
    ) -> Any:
        """Begins a call. Credentials and compression mean nothing inside a process."""
        channel = self._channel
        if channel.closed:
            raise grpc.aio.UsageError("Channel is closed.")
        rpc = Rpc(
            self._method, self._streams, self._streamed, tuple(metadata) if metadata else (), timeout,
            self._serialize, self._deserialize, channel.limits, channel.under_way, channel.services.unchanged,
        )  # fmt: skip
        if not self._streams:
            rpc.request = request
        if rpc.status is None:
            _begin(rpc, channel, bool(wait_for_ready))
        if self._streams and request is not None:
            _send_all(rpc, request, channel)
        return self._kind(rpc)


def _begin(rpc: Rpc, channel: InProcessChannel, wait: bool) -> None:
    server = channel.services.at(channel.address)
    if server is not None:
        server.begin(rpc)
    elif wait:
        rpc.task = asyncio.get_running_loop().create_task(_begin_once_served(rpc, channel))
    else:
        rpc.finish(Status(grpc.StatusCode.UNAVAILABLE, f"nothing serves {channel.address} in this process now"))


async def _begin_once_served(rpc: Rpc, channel: InProcessChannel) -> None:
    server = await channel.services.arrival(channel.address)
    if rpc.status is None:
        server.begin(rpc)


def _send_all(rpc: Rpc, requests: AsyncIterable[Any] | Iterable[Any], channel: InProcessChannel) -> None:
    sender = asyncio.get_running_loop().create_task(calls.send_all(rpc, requests))
    channel.senders.add(sender)
    sender.add_done_callback(channel.senders.discard)
    rpc.when_over(sender.cancel)
