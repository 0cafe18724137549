"""What the gateway serves, for tools that ask it: `grpc.reflection` in both its versions, whose messages are the same.

ghz and others ask for a method, such as `mosel.v1.Gateway.Predict`; grpc's own library finds services and messages.
"""

from collections.abc import Iterable
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from gateway.inference.messages import POOL

_OLD = reflection.SERVICE_NAME
_NEW = _OLD.replace("v1alpha", "v1")
_METHOD = "ServerReflectionInfo"


class Reflection(reflection.aio.ReflectionServicer):
    """Serves `ServerReflection`."""

    def _file_containing_symbol(self, request: Any, fully_qualified_name: str) -> Any:
        service, _, method = fully_qualified_name.rpartition(".")
        try:
            if method in POOL.FindServiceByName(service).methods_by_name:
                fully_qualified_name = service
        except KeyError:
            # It is no method.
            pass
        return super()._file_containing_symbol(request, fully_qualified_name)  # type: ignore[misc]


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Has a server tell of its services and of both versions of this one.

    Args:
        server: not started yet.
        services: full names, in the pool of `gateway.inference.messages`.
    """
    servicer = Reflection((*services, _OLD, _NEW), pool=POOL)
    handler: Any = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (_OLD, _NEW):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {_METHOD: handler}),))
