"""Every service's metrics on one page, for Prometheus."""

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.selector_link import SelectorLink
from mosel.observability.metrics import CONTENT_TYPE, Metrics, merged, up


class MetricsPage:
    """Asks every service when it is asked; one that does not answer within a second is left out, as `mosel_up` says.

    Args:
        metrics: of this process.
        link: knows the other services.
    """

    def __init__(self, metrics: Metrics, link: SelectorLink) -> None:
        self._metrics, self._link = metrics, link
        self._writing: asyncio.Task[bytes] | None = None

    async def text(self) -> bytes:
        """The page; who asks while it is being written gets the same one."""
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(), name="metrics page")
        return await asyncio.shield(self._writing)

    def app(self) -> Any:
        """The ASGI application that serves it at `/metrics`; starlette and uvicorn have different types for that."""

        async def metrics(request: Request) -> Response:
            return Response(await self.text(), headers={"content-type": CONTENT_TYPE})

        return Starlette(routes=[Route("/metrics", metrics)])

    async def _write(self) -> bytes:
        others = await self._link.metrics()
        answered = {self._metrics.service: True} | {other.service: bool(other.text) for other in others}
        return merged([up(answered), await self._metrics.page(), *(other.text for other in others)])
