"""The guard in front of gRPC."""

import contextlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc

from gateway.access.guard import Guard
from gateway.access.methods import METHODS, Access, access_to
from mosel.errors import MoselError
from mosel.runtime.service import Context, abort_with

# What a stream of these brings is a request each; a stream of SubmitJob brings the items of one.
_REQUEST_PER_MESSAGE = "/inference.GRPCInferenceService/ModelStreamInfer"

_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class OnlyTenants(grpc.aio.ServerInterceptor):
    """Lets in calls whose metadata `authorization` has a tenant's token, within the tenant's limits.

    It comes before all other interceptors: what it refuses is not read, let alone parsed.

    Args:
        guard: knows the tenants.
        methods: whom each method is for.
    """

    def __init__(self, guard: Guard, methods: Mapping[str, Access] = METHODS) -> None:
        self._guard, self._methods = guard, methods

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Puts the guard in front of the method's own handler."""
        method = handler_call_details.method
        access, handler = access_to(method, self._methods), await continuation(handler_call_details)
        if access is Access.ALL:
            return handler
        tenant = ""
        try:
            metadata = handler_call_details.invocation_metadata
            tenant = self._guard.identify([str(value) for key, value in metadata if key == "authorization"])
            # A method that does not exist is nobody's.
            if access is Access.ADMINS and handler is not None:
                self._guard.check_admin(tenant, method)
            self._guard.check(tenant)
        except MoselError as error:
            return self._refusal(error, method, tenant)
        return None if handler is None else _GuardedCall(self._guard, tenant, method, handler).handler()

    def _refusal(self, error: MoselError, method: str, tenant: str) -> Any:
        async def refuse(requests: object, context: Context) -> None:
            self._guard.refused(error, context.peer(), method, tenant)
            await abort_with(context, error)

        # A handler of streams, whatever the method is: it answers before it has read the request.
        return grpc.stream_stream_rpc_method_handler(refuse)


class _GuardedCall:
    """A call of a tenant: the method's own handler, inside the tenant's limits."""

    def __init__(self, guard: Guard, tenant: str, method: str, own: Any) -> None:
        self._guard, self._tenant, self._method, self._own = guard, tenant, method, own
        self._kind = next(kind for kind in _KINDS if getattr(own, kind) is not None)
        self._function = getattr(own, self._kind)
        self._parse = own.request_deserializer or bytes
        self._peer = ""

    def handler(self) -> Any:
        """As gRPC wants it."""
        # A single request is parsed by `_call`, which must know its bytes.
        deserializer = self._counted if self._own.request_streaming else None
        return self._own._replace(request_deserializer=deserializer, **{self._kind: self._call})

    async def _call(self, request: Any, context: Context) -> Any:
        self._peer = context.peer()
        with contextlib.ExitStack() as entered:
            try:
                nbytes = 0 if self._own.request_streaming else len(request)
                entered.enter_context(self._guard.enter(self._tenant, nbytes))
            except MoselError as error:
                self._refused(error)
                await abort_with(context, error)
            try:
                return await self._run(request if self._own.request_streaming else self._parse(request), context)
            except MoselError as error:
                # Of a message in a stream, by a handler that leaves it to others.
                await abort_with(context, error)

    async def _run(self, request: Any, context: Context) -> Any:
        if inspect.isasyncgenfunction(self._function):
            async for answer in self._function(request, context):
                await context.write(answer)
            return None
        return await self._function(request, context)

    def _counted(self, data: bytes) -> Any:
        """Parses a message of a stream if it is within the limits."""
        try:
            self._guard.charge(self._tenant, len(data), int(self._method == _REQUEST_PER_MESSAGE))
        except MoselError as error:
            self._refused(error)
            raise
        return self._parse(data)

    def _refused(self, error: MoselError) -> None:
        self._guard.refused(error, self._peer, self._method, self._tenant)
