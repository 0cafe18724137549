"""HTTP in front of the data plane, as the Open Inference Protocol: convert, call, convert back."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.data_plane import DataPlane
from gateway.http_replies import JsonReply, answers_with_error, not_routed
from gateway.inference import metadata
from gateway.inference.bodies import Bodies, compressed
from gateway.inference.infer import infer
from gateway.inference.json_codec import HEADER_LENGTH, json_bytes_of, read_request, write_response
from gateway.inference.json_messages import IndexRequestJson, LoadRequestJson, read
from gateway.inference.openapi import document
from gateway.inference.requests import served
from gateway.inference.words import InferRequest, InferResponse
from mosel.deadline import Deadline
from mosel.errors import Cancelled, InvalidRequest, PayloadTooLarge
from mosel.packages.model_package import ModelPackage
from mosel.runtime.service import MAX_DEADLINE_S

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]

_MIB = 1024 * 1024
# More would hold up other calls for more than about a millisecond.
_OFF_LOOP_JSON_BYTES, _OFF_LOOP_OUTPUTS = 64 * 1024, 2048
# Triton's clients send it; no model depends on another.
_UNLOAD_DEPENDENTS = "unload_dependents"


class InferenceHttp:
    """Serves the protocol; a context manager that owns a thread."""

    def __init__(self, data_plane: DataPlane) -> None:
        self._data_plane = data_plane
        self._bodies, self._document = Bodies(data_plane.settings, data_plane.arriving), document()
        # One: what is large waits for its turn, for JSON takes many times its size while it is read.
        self._thread = ThreadPoolExecutor(1, "json")

    def __enter__(self) -> "InferenceHttp":
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def app(self) -> Starlette:
        """The application."""
        routes = [Route(path, endpoint, methods=[method]) for method, path, endpoint in self._routes()]
        app = Starlette(routes=routes, exception_handlers={HTTPException: not_routed})
        app.router.redirect_slashes = False
        return app

    def _routes(self) -> Iterator[tuple[str, str, Endpoint]]:
        yield "GET", "/openapi.json", self.openapi
        yield "GET", "/v2", self.server_metadata
        yield "GET", "/v2/health/live", self.server_live
        yield "GET", "/v2/health/ready", self.server_ready
        yield "GET", "/v2/models/stats", self.statistics
        for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            yield "GET", model, self.model_metadata
            yield "GET", f"{model}/ready", self.model_ready
            yield "GET", f"{model}/config", self.model_config
            yield "GET", f"{model}/stats", self.statistics
            yield "POST", f"{model}/infer", self.infer
        yield "POST", "/v2/repository/index", self.repository_index
        yield "POST", "/v2/repository/models/{model}/load", self.load
        yield "POST", "/v2/repository/models/{model}/unload", self.unload

    @answers_with_error
    async def openapi(self, request: Request) -> Response:
        """The whole of it, described."""
        return JsonReply(self._document)

    @answers_with_error
    async def server_live(self, request: Request) -> Response:
        """It answers, so it lives."""
        return JsonReply({"live": True})

    @answers_with_error
    async def server_ready(self, request: Request) -> Response:
        """Whether every model would answer."""
        return _ready({}, metadata.server_ready(self._data_plane))

    @answers_with_error
    async def server_metadata(self, request: Request) -> Response:
        """Who answers."""
        return JsonReply(metadata.server_metadata())

    @answers_with_error
    async def model_metadata(self, request: Request) -> Response:
        """Inputs and outputs of a model."""
        return JsonReply(metadata.model_metadata(self._served(request)))

    @answers_with_error
    async def model_ready(self, request: Request) -> Response:
        """Whether a model would answer."""
        name, version = self._served(request).name, _version(request)
        return _ready({"name": name}, metadata.model_ready(self._data_plane, name, version))

    @answers_with_error
    async def model_config(self, request: Request) -> Response:
        """A model as Triton describes one."""
        return JsonReply(metadata.model_config(self._data_plane, self._served(request)))

    @answers_with_error
    async def statistics(self, request: Request) -> Response:
        """What became of the requests to a model, or to each."""
        model = request.path_params.get("model", "")
        return JsonReply(metadata.model_statistics(self._data_plane, model, _version(request)))

    @answers_with_error
    async def repository_index(self, request: Request) -> Response:
        """The models, and whether they would answer."""
        async with self._bodies.read(request) as body:
            only_ready = read(body or b"{}", IndexRequestJson).ready
        return JsonReply(metadata.repository_index(self._data_plane, only_ready))

    @answers_with_error
    async def load(self, request: Request) -> Response:
        """Loads a model, or loads it anew."""
        await self._check_parameters(request)
        await self._data_plane.load(request.path_params["model"])
        return JsonReply({})

    @answers_with_error
    async def unload(self, request: Request) -> Response:
        """Unloads a model."""
        await self._check_parameters(request, _UNLOAD_DEPENDENTS)
        await self._data_plane.unload(request.path_params["model"])
        return JsonReply({})

    @answers_with_error
    async def infer(self, request: Request) -> Response:
        """Answers a request; it ends when its caller goes away."""
        jobs = self._data_plane.jobs
        with jobs.begin(request.path_params["model"]) as life:
            self._served(request)
            # The body of what is refused anyway is not read.
            jobs.check_room()
            async with self._bodies.read(request) as body:
                life.admit(Deadline.after(MAX_DEADLINE_S))
                asked = await self._read(request, body)
                response = await _unless_gone(request, infer(self._data_plane, life, asked))
        return await self._write(request, asked, response)

    def _served(self, request: Request) -> ModelPackage:
        return served(request.path_params["model"], _version(request), self._data_plane.packages)

    async def _check_parameters(self, request: Request, *ignored: str) -> None:
        async with self._bodies.read(request) as body:
            sent = read(body or b"{}", LoadRequestJson).parameters
        if unknown := sent.keys() - ignored:
            raise InvalidRequest(f"parameters has '{min(unknown)}'; expected none: a model's folder says all")

    async def _read(self, request: Request, body: memoryview) -> InferRequest:
        size = json_bytes_of(request.headers.get(HEADER_LENGTH), len(body))
        limit = self._data_plane.settings.gateway.max_json_mib * _MIB
        if size > limit:
            raise PayloadTooLarge(
                f"the JSON has {size} bytes; expected at most {limit} (setting gateway.max_json_mib): "
                "send tensors as binary data"
            )
        model, version = request.path_params["model"], _version(request)
        return await self._run(partial(read_request, model, version, body, size), size > _OFF_LOOP_JSON_BYTES)

    async def _write(self, request: Request, asked: InferRequest, response: InferResponse) -> Response:
        accepted = request.headers.get("accept-encoding", "")

        def write() -> Response:
            written = write_response(asked, response)
            headers = {} if written.json_bytes is None else {HEADER_LENGTH: str(written.json_bytes)}
            media = JsonReply.media_type if written.json_bytes is None else "application/octet-stream"
            body, encoding = compressed(written.body, accepted)
            return Response(body, headers=headers | encoding, media_type=media)

        elements = sum(output.array.size for output in response.outputs)
        return await self._run(write, elements > _OFF_LOOP_OUTPUTS)

    async def _run(self, work: Callable[[], T], large: bool) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work) if large else work()


def _version(request: Request) -> str:
    return str(request.path_params.get("version", ""))


def _ready(content: metadata.Json, ready: bool) -> Response:
    return JsonReply(content | {"ready": ready}, 200 if ready else 503)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work, which is cancelled if the caller goes away first; its body has been read.

    Raises:
        Cancelled: the caller went away.
    """
    working = asyncio.create_task(work, name="infer")
    leaving = asyncio.create_task(_gone(request), name="is the caller still there")
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("the caller went away")
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
