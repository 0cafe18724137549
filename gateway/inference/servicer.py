"""gRPC in front of the data plane, as the Open Inference Protocol: convert, call, convert back."""

import asyncio
import logging
import math
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from gateway.data_plane import DataPlane
from gateway.inference import metadata
from gateway.inference.conversions import message_from, request_from
from gateway.inference.infer import infer
from gateway.inference.messages import SERVICE, ModelInferResponse, ModelStreamInferResponse, class_of, message
from gateway.inference.requests import served
from gateway.jobs.store import OFF_LOOP_ELEMENTS
from mosel.deadline import Deadline
from mosel.errors import InvalidRequest, MoselError
from mosel.packages.model_package import ModelPackage
from mosel.runtime.service import Context, answers_with_status, deadline_of
from mosel.status import message_of

# Requests of one stream that wait for their answers; no more is read until the first has it.
_IN_FLIGHT = 16

log = logging.getLogger(__name__)


class InferenceServicer:
    """Serves `inference.GRPCInferenceService`."""

    def __init__(self, data_plane: DataPlane) -> None:
        self._data_plane = data_plane

    @answers_with_status
    async def ServerLive(self, request: Any, context: Context) -> Message:
        return message("ServerLiveResponse", {"live": True})

    @answers_with_status
    async def ServerReady(self, request: Any, context: Context) -> Message:
        return message("ServerReadyResponse", {"ready": metadata.server_ready(self._data_plane)})

    @answers_with_status
    async def ModelReady(self, request: Any, context: Context) -> Message:
        ready = metadata.model_ready(self._data_plane, request.name, request.version)
        return message("ModelReadyResponse", {"ready": ready})

    @answers_with_status
    async def ServerMetadata(self, request: Any, context: Context) -> Message:
        return message("ServerMetadataResponse", metadata.server_metadata())

    @answers_with_status
    async def ModelMetadata(self, request: Any, context: Context) -> Message:
        return message("ModelMetadataResponse", metadata.model_metadata(self._served(request)))

    @answers_with_status
    async def ModelConfig(self, request: Any, context: Context) -> Message:
        return message(
            "ModelConfigResponse", {"config": metadata.model_config(self._data_plane, self._served(request))}
        )

    @answers_with_status
    async def ModelStatistics(self, request: Any, context: Context) -> Message:
        statistics = metadata.model_statistics(self._data_plane, request.name, request.version)
        return message("ModelStatisticsResponse", statistics)

    @answers_with_status
    async def RepositoryIndex(self, request: Any, context: Context) -> Message:
        _check_repository(request)
        return message(
            "RepositoryIndexResponse", {"models": metadata.repository_index(self._data_plane, request.ready)}
        )

    @answers_with_status
    async def RepositoryModelLoad(self, request: Any, context: Context) -> Message:
        _check_repository(request)
        if request.parameters:
            raise InvalidRequest(
                f"parameters has '{min(request.parameters)}'; expected none: a model's folder says all"
            )
        await self._data_plane.load(request.model_name)
        return message("RepositoryModelLoadResponse", {})

    @answers_with_status
    async def RepositoryModelUnload(self, request: Any, context: Context) -> Message:
        _check_repository(request)
        await self._data_plane.unload(request.model_name)
        return message("RepositoryModelUnloadResponse", {})

    @answers_with_status
    async def ModelInfer(self, request: Any, context: Context) -> Any:
        return await self._infer(request, deadline_of(context))

    @answers_with_status
    async def ModelStreamInfer(self, request_iterator: object, context: Context) -> None:
        answers: asyncio.Queue[asyncio.Task[Message] | None] = asyncio.Queue(_IN_FLIGHT)

        async def take(group: asyncio.TaskGroup) -> None:
            while (request := await _read(context)) is not grpc.aio.EOF:
                await answers.put(group.create_task(self._streamed(request, deadline_of(context))))
            await answers.put(None)

        # Ending the call cancels this task, and with the group all that is under way.
        async with asyncio.TaskGroup() as group:
            group.create_task(take(group))
            while (answer := await answers.get()) is not None:
                await context.write(await answer)

    def _served(self, request: Any) -> ModelPackage:
        return served(request.name, request.version, self._data_plane.packages)

    async def _infer(self, request: Any, call: Deadline) -> Any:
        with self._data_plane.jobs.begin(request.model_name) as life:
            life.admit(call)
            if sum(math.prod(tensor.shape) for tensor in request.inputs) > OFF_LOOP_ELEMENTS:
                converted = await asyncio.to_thread(request_from, request)
            else:
                converted = request_from(request)
            return message_from(await infer(self._data_plane, life, converted))

    async def _streamed(self, request: Any | MoselError, call: Deadline) -> Message:
        """What a stream answers to one of its requests."""
        try:
            if isinstance(request, MoselError):
                with self._data_plane.jobs.begin(""):
                    raise request
            response = await self._infer(request, call)
        except MoselError as error:
            reason = message_of(error)
        except Exception:
            log.exception("unexpected error", extra={"method": "ModelStreamInfer"})
            reason = "internal error in ModelStreamInfer; the log has more"
        else:
            # Triton's clients ask for it where a request may have any number of responses.
            response.parameters["triton_final_response"].bool_param = True
            return ModelStreamInferResponse(infer_response=response)  # type: ignore[no-any-return]
        failed = ModelInferResponse(id=getattr(request, "id", ""), model_name=getattr(request, "model_name", ""))
        return ModelStreamInferResponse(error_message=reason, infer_response=failed)  # type: ignore[no-any-return]


def handlers(servicer: InferenceServicer) -> grpc.GenericRpcHandler:
    """The servicer's methods as a server takes them."""
    methods = {}
    for method in SERVICE.methods:
        handler = (
            grpc.stream_stream_rpc_method_handler if method.client_streaming else grpc.unary_unary_rpc_method_handler
        )
        request, response = class_of(method.input_type), class_of(method.output_type)
        methods[method.name] = handler(getattr(servicer, method.name), request.FromString, response.SerializeToString)
    return grpc.method_handlers_generic_handler(SERVICE.full_name, methods)


async def _read(context: Context) -> Any:
    """The next request of a stream, or the error that it gives, or the end."""
    try:
        return await context.read()
    except DecodeError:
        return InvalidRequest("a request's bytes are no message that ModelStreamInfer knows")
    except MoselError as error:
        # It is beyond a limit of its tenant.
        return error


def _check_repository(request: Any) -> None:
    if request.repository_name:
        raise InvalidRequest(f"repository_name is '{request.repository_name}'; expected none: there is one repository")
