"""What limits every server: grpc.aio in one process with the same networks, which refuses what is too much.

It answers `Predict` of `mosel.v1` with one modality set, in batches, and refuses each call beyond a fixed number under
way before it parses it. It has no floors, deadlines, checks, logs or metrics: a yardstick, not a server.
"""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import uvloop

from bench.one_process import Batches, compute_with, networks_of
from mosel.config import Settings
from mosel.modality import ModalitySet
from mosel.packages.model_package import load_package
from mosel.tensors import from_proto, to_proto
from mosel.v1 import gateway_pb2


class Bare:
    """The server in a process of its own; a context manager.

    Args:
        package: the model package's folder.
        settings: of the services that it is compared with.
        modality_set: what it runs.
        most: calls that may be under way.

    Attributes:
        address: where it listens, inside the block.
    """

    def __init__(self, package: Path, settings: Settings, modality_set: ModalitySet, most: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        given = (package, settings, modality_set, most, theirs)
        self._process = context.Process(target=_serve, args=given, daemon=True)

    def __enter__(self) -> "Bare":
        self._process.start()
        self.address: str = self._connection.recv()
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.join()


class _Server:
    def __init__(self, folder: Path, settings: Settings, modality_set: ModalitySet, most: int) -> None:
        self._batches = Batches(compute_with(*networks_of(load_package(folder), settings)))
        self._chosen, self._most, self._under_way = sorted(modality_set), most, 0

    async def predict(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """Answers a call, or refuses it."""
        if self._under_way >= self._most:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
        self._under_way += 1
        try:
            request = gateway_pb2.PredictRequest.FromString(data)
            payloads = {m: from_proto(request.payloads[m], m) for m in self._chosen}
            output = await self._batches.answer(self._chosen, payloads)
            return gateway_pb2.PredictReply(output=to_proto(output)).SerializeToString()
        finally:
            self._under_way -= 1


def _serve(package: Path, settings: Settings, modality_set: ModalitySet, most: int, connection: Connection) -> None:
    async def run() -> None:
        own, server = _Server(package, settings, modality_set, most), grpc.aio.server()
        method: Any = grpc.unary_unary_rpc_method_handler(own.predict)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("mosel.v1.Gateway", {"Predict": method}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        connection.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    uvloop.run(run())
