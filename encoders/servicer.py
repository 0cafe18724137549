"""gRPC in front of `ModalityEncoder`: convert, call, convert back."""

import os
from functools import partial

from encoders.encoder import ModalityEncoder
from mosel.compute import Workers
from mosel.service import Context, answers_with_status, deadline_of
from mosel.transport import Arena, Publisher
from mosel.v1 import encoder_pb2, encoder_pb2_grpc, service_pb2, tensor_pb2


class EncoderServicer(encoder_pb2_grpc.EncoderServicer):
    """Serves `mosel.v1.Encoder`.

    Args:
        encoder: the networks.
        workers: the threads that they run on.
        arena: where embeddings are kept.
        publisher: gives slots back.
        address: where this service listens.
        lease_grace_s: seconds for which embeddings outlive the deadline of their call.
    """

    def __init__(
        self,
        encoder: ModalityEncoder,
        workers: Workers,
        arena: Arena,
        publisher: Publisher,
        address: str,
        lease_grace_s: float,
    ) -> None:
        self._encoder, self._workers, self._arena, self._publisher = encoder, workers, arena, publisher
        self._address, self._lease_grace_s = address, lease_grace_s

    @answers_with_status
    async def Encode(self, request: encoder_pb2.EncodeRequest, context: Context) -> encoder_pb2.EncodeReply:
        deadline = deadline_of(context)
        lease_s = deadline.remaining + self._lease_grace_s
        ref, seconds = await self._workers.run(
            lambda: self._encoder.encode(request.model, request.rows, lease_s), deadline, "encoding"
        )
        return encoder_pb2.EncodeReply(embeddings=ref, compute_us=round(seconds * 1e6))

    @answers_with_status
    async def Profile(self, request: encoder_pb2.ProfileEncoderRequest, context: Context) -> service_pb2.ProfileReply:
        def measure(size: int) -> float:
            return self._encoder.measure_ms(request.model, size, request.repeats)

        deadline = deadline_of(context)
        reply = service_pb2.ProfileReply()
        for size in request.batch_sizes:
            ms = await self._workers.run(partial(measure, size), deadline, "measuring")
            reply.points.add(batch_size=size, p50_ms=ms)
        return reply

    @answers_with_status
    async def Release(self, request: tensor_pb2.ReleaseSlots, context: Context) -> tensor_pb2.ReleaseReply:
        self._publisher.release(request.slots)
        return tensor_pb2.ReleaseReply()

    @answers_with_status
    async def Status(self, request: service_pb2.StatusRequest, context: Context) -> service_pb2.ServiceStatus:
        slots = self._arena.statistics()
        counters = dict(self._encoder.counters) | self._workers.statistics() | slots.as_counters()
        name = f"encoder/{self._encoder.modality}"
        return service_pb2.ServiceStatus(
            name=name, address=self._address, ready=True, pid=os.getpid(), counters=counters
        )
