"""`grpc.health.v1`: the empty name says that the process is alive, other names whether what they name can be used.

Not the servicer of grpcio-health-checking: there, a watcher that leaves takes the notifications of all others along,
and one that stays holds up the end of its service.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):
    """Serves `grpc.health.v1.Health` for one process."""

    def __init__(self) -> None:
        self._watchers: Counter[str] = Counter()
        self._serving: dict[str, bool] = {}
        self._stopping = False
        self._changed = asyncio.Event()

    def set(self, name: str, serving: bool) -> None:
        """From now on, this is the answer for a name."""
        if self._serving.get(name) != serving:
            self._serving[name] = serving
            self._tell()

    def stop(self) -> None:
        """Nothing is serving any more; watchers are told so, and their calls end."""
        self._stopping = True
        self._tell()

    async def unwatched(self, names: Iterable[str]) -> None:
        """Returns when nobody watches any of some names."""
        while any(self._watchers[name] for name in names):
            await self._changed.wait()

    async def Check(  # noqa: N802, D102 (named and documented by the proto)
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == _UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802, D102 (named and documented by the proto)
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> None:
        last = None
        self._watchers[request.service] += 1
        try:
            while True:
                # Looked at together: the end may come while the last change is being sent, and is told then.
                changed, status, stopping = self._changed, self._status(request.service), self._stopping
                if status != last:
                    last = status
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                if stopping:
                    return
                await changed.wait()
        finally:
            self._watchers[request.service] -= 1
            self._tell()

    def _status(self, name: str) -> int:
        if name not in self._serving:
            return _UNKNOWN
        return _SERVING if self._serving[name] and not self._stopping else _NOT_SERVING

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
