"""The server's side: finds the handler of a call, and runs it in a task of its own."""

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from contextvars import Context, copy_context
from functools import partial
from typing import Any, NamedTuple

import grpc

from mosel.runtime.in_process.context import InProcessContext
from mosel.runtime.in_process.handing_over import Options, TooLarge, limits
from mosel.runtime.in_process.local_services import LocalServices, local_services
from mosel.runtime.in_process.rpc import CANCELLED, STOPPED, Metadata, Rpc, Status

log = logging.getLogger(__name__)


class _CallDetails(NamedTuple):
    """What interceptors and generic handlers are told of a call."""

    method: str
    invocation_metadata: Metadata


class InProcessServer:
    """Stands for a `grpc.aio.Server` where its callers are in the same process.

    Handlers run in the context that the server was started in, and each in a copy: none sees what its caller or
    another handler set.

    Args:
        address: what its callers know it by.
        options: as those of a server; the limits of messages count.
        interceptors: what sees each call first.
        services: where it is found.
    """

    def __init__(
        self,
        address: str,
        options: Options = (),
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        services: LocalServices = local_services,
    ) -> None:
        self._address, self._services, self._limits = address, services, limits(options)
        self._interceptors = tuple(interceptors)
        self._handlers: dict[str, Any] = {}
        self._generic: list[grpc.GenericRpcHandler] = []
        self._calls: dict[asyncio.Task[None], Rpc] = {}
        self._context = Context()

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Adds handlers that say themselves which methods they have."""
        self._generic.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Adds the methods of a service; they go before generic handlers."""
        self._handlers |= {f"/{service_name}/{method}": handler for method, handler in method_handlers.items()}

    async def start(self) -> None:
        """Takes calls from now on.

        Raises:
            ConfigError: another serves the address.
        """
        self._context = copy_context()
        self._services.add(self._address, self)

    async def stop(self, grace: float | None) -> None:
        """Takes no more calls, and waits for those under way, `grace` seconds long before they are cancelled."""
        self._services.remove(self._address, self)
        if self._calls and grace:
            await asyncio.wait(list(self._calls), timeout=grace)
        for rpc in list(self._calls.values()):
            rpc.break_off(STOPPED)
        if self._calls:
            await asyncio.wait(list(self._calls))
        self._services.check_messages()

    def begin(self, rpc: Rpc) -> None:
        """Takes a call."""
        task = asyncio.get_running_loop().create_task(self._serve(rpc), name=rpc.method, context=self._context.copy())
        rpc.task = task
        self._calls[task] = rpc
        task.add_done_callback(partial(self._over, rpc))

    def _over(self, rpc: Rpc, task: "asyncio.Task[None]") -> None:
        del self._calls[task]
        # Its context may refer to the call.
        rpc.task = None
        # It was cancelled, perhaps before it began.
        rpc.break_off(CANCELLED)

    async def _serve(self, rpc: Rpc) -> None:
        """Runs the handler; whatever it raises becomes a status."""
        context: InProcessContext | None = None
        try:
            # At once for most calls.
            handler = None if self._interceptors else self._handlers.get(rpc.method)
            if handler is None:
                handler = await self._intercepted(self._interceptors, _CallDetails(rpc.method, rpc.metadata))
            if handler is None:
                rpc.finish(Status(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"))
                return
            context = InProcessContext(rpc, handler, self._limits)
            await _run(handler, context)
        except (grpc.aio.AbortError, TooLarge):
            # The call has ended with it.
            pass
        except Exception as error:
            log.exception("unexpected error", extra={"method": rpc.method})
            details = f"Unexpected {type(error)}: {error}"
            if context is None:
                rpc.finish(Status(grpc.StatusCode.UNKNOWN, details))
            else:
                context.fail(grpc.StatusCode.UNKNOWN, details)

    async def _intercepted(self, interceptors: Sequence[grpc.aio.ServerInterceptor], details: Any) -> Any:
        """The handler after these interceptors have seen the call."""
        if interceptors:
            return await interceptors[0].intercept_service(partial(self._intercepted, interceptors[1:]), details)
        found = self._handlers.get(details.method)
        if found is not None:
            return found
        return next(filter(None, (generic.service(details) for generic in self._generic)), None)


async def _run(handler: Any, context: InProcessContext) -> None:
    """Has a handler answer."""
    method = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    answer = method(context if handler.request_streaming else context.request(), context)
    if hasattr(answer, "__aiter__"):
        async with contextlib.aclosing(answer):
            async for message in answer:
                await context.write(message)
        answer = None
    else:
        answer = await answer
    context.end(answer)
