"""A gateway that refuses as it is told, and keeps what it gets."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from mosel.errors import MoselError
from mosel.runtime.service import Context, answers_with_status
from mosel.v1 import gateway_pb2, tensor_pb2


class Refusing:
    """Predict of a gateway: answers each attempt with the next error of its list, and when there is none left, well.

    Attributes:
        advice: what it says that jobs should bring.
        planned: the plans that it was asked for.
    """

    def __init__(self) -> None:
        self.errors: list[MoselError] = []
        self.requests: list[gateway_pb2.PredictRequest] = []
        self.metadata: list[dict[str, str]] = []
        self.advice: gateway_pb2.UploadAdvice | None = None
        self.planned: list[gateway_pb2.JobSpec] = []

    @answers_with_status
    async def predict(self, request: gateway_pb2.PredictRequest, context: Context) -> gateway_pb2.PredictReply:
        self.requests.append(request)
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata() or ()})
        if self.errors:
            raise self.errors.pop(0)
        output = tensor_pb2.Tensor(dtype=tensor_pb2.FP32, shape=[0])
        return gateway_pb2.PredictReply(job_id="well", output=output, upload=self.advice)

    @answers_with_status
    async def plan(self, request: gateway_pb2.PlanRequest, context: Context) -> gateway_pb2.PlanReply:
        self.planned.append(request.job)
        return gateway_pb2.PlanReply(upload=self.advice)

    def server(self) -> grpc.aio.Server:
        """A server that listens nowhere yet."""
        server = grpc.aio.server()
        request, reply = gateway_pb2.PredictRequest.FromString, gateway_pb2.PredictReply.SerializeToString
        handlers: dict[str, Any] = {"Predict": grpc.unary_unary_rpc_method_handler(self.predict, request, reply)}
        asked, plan = gateway_pb2.PlanRequest.FromString, gateway_pb2.PlanReply.SerializeToString
        handlers["Plan"] = grpc.unary_unary_rpc_method_handler(self.plan, asked, plan)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("mosel.v1.Gateway", handlers)])
        return server

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """Listens inside the block; gives the address."""
        server = self.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield f"127.0.0.1:{port}"
        await server.stop(None)
