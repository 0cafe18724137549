"""A gateway that refuses as it is told, and keeps what it gets."""

import grpc

from mosel.errors import MoselError
from mosel.runtime.service import Context, answers_with_status
from mosel.v1 import gateway_pb2, tensor_pb2


class Refusing:
    """Predict of a gateway: answers each attempt with the next error of its list, and when there is none left, well."""

    def __init__(self) -> None:
        self.errors: list[MoselError] = []
        self.requests: list[gateway_pb2.PredictRequest] = []
        self.metadata: list[dict[str, str]] = []

    @answers_with_status
    async def predict(self, request: gateway_pb2.PredictRequest, context: Context) -> gateway_pb2.PredictReply:
        self.requests.append(request)
        self.metadata.append({key: str(value) for key, value in context.invocation_metadata() or ()})
        if self.errors:
            raise self.errors.pop(0)
        return gateway_pb2.PredictReply(job_id="well", output=tensor_pb2.Tensor(dtype=tensor_pb2.FP32, shape=[0]))

    def server(self) -> grpc.aio.Server:
        """A server that listens nowhere yet."""
        server = grpc.aio.server()
        request, reply = gateway_pb2.PredictRequest.FromString, gateway_pb2.PredictReply.SerializeToString
        handler = grpc.unary_unary_rpc_method_handler(self.predict, request, reply)
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("mosel.v1.Gateway", {"Predict": handler})]
        )
        return server
