"""The HTTP port of a gateway in this process, and clients of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from gateway.inference.http import InferenceHttp
from mosel.runtime.http import HttpServer
from mosel.v1 import selector_pb2
from tests.gateway.inference.json_support import Body
from tests.gateway.scripted import Gateway

INFER = "/v2/models/fruit/infer"


@dataclass(frozen=True)
class Http:
    """The HTTP port of a gateway, and a client."""

    server: HttpServer
    client: httpx.AsyncClient

    async def infer(self, body: Body, path: str = INFER, **headers: str) -> httpx.Response:
        return await self.client.post(path, content=body.content, headers=dict(body.headers) | headers)


@asynccontextmanager
async def speaking_http(gateway: Gateway, idle_s: float = 60, **limits: float) -> AsyncIterator[Http]:
    """An HTTP port in front of a gateway; limits are settings of its section."""
    changed = gateway.data_plane.settings.gateway.model_copy(update=limits)
    gateway.data_plane.settings = gateway.data_plane.settings.model_copy(update={"gateway": changed})
    with InferenceHttp(gateway.data_plane) as inference:
        server = HttpServer(inference.app(), "127.0.0.1", 0, "--http-port", 5, idle_s=idle_s)
        async with (
            server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=30, trust_env=False) as client,
        ):
            yield Http(server, client)


def refusal(response: httpx.Response) -> tuple[int, str]:
    """The status of an answer, and its error."""
    assert response.headers["content-type"] == "application/json"
    (content,) = response.json().items()
    assert content[0] == "error"
    return response.status_code, content[1]


async def under_way(gateway: Gateway, call: Any) -> tuple["asyncio.Task[httpx.Response]", selector_pb2.JobDescription]:
    """A call whose job the selector has."""
    task = asyncio.create_task(call)
    arriving = asyncio.create_task(gateway.job_at_selector())
    await asyncio.wait((task, arriving), return_when=asyncio.FIRST_COMPLETED)
    if not arriving.done():
        arriving.cancel()
        raise AssertionError(f"answered at once: {task.result().text}")
    return task, arriving.result()
