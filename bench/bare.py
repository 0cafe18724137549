"""What limits every server: grpc.aio in one process with the same networks, which refuses what is too much.

It answers `Predict` of `mosel.v1` with one modality set, in batches, and refuses each call beyond a fixed number under
way before it parses it. It has no floors, deadlines, checks, logs or metrics: a yardstick, not a server.
"""

import asyncio
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
import uvloop
from numpy.typing import NDArray

from mosel.compute import networks
from mosel.compute.forms import Forms
from mosel.compute.networks import Loaded
from mosel.config import Settings
from mosel.modality import ModalitySet
from mosel.packages.model_package import load_package
from mosel.tensors import from_proto, to_proto
from mosel.v1 import gateway_pb2

_WORKERS, _MOST_ITEMS = 2, 32


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
        package, device = load_package(folder), networks.choose_device(settings.device)
        forms = Forms(settings, device)
        self._encoders = {
            m: forms.of_encoder(Loaded.plain(package, networks.load_encoder(package, m, device)), m).network
            for m in sorted(modality_set)
        }
        self._fusion = forms.of_fusion(Loaded.plain(package, networks.load_fusion(package, device))).network
        self._most, self._under_way, self._free = most, 0, _WORKERS
        self._pool = ThreadPoolExecutor(_WORKERS, initializer=torch.set_num_threads, initargs=(1,))
        self._waiting = list[tuple[gateway_pb2.PredictRequest, asyncio.Future[NDArray[np.float32]]]]()

    async def predict(self, data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """Answers a call, or refuses it."""
        if self._under_way >= self._most:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")
        self._under_way += 1
        try:
            done: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
            self._waiting.append((gateway_pb2.PredictRequest.FromString(data), done))
            self._begin()
            return gateway_pb2.PredictReply(output=to_proto(await done)).SerializeToString()
        finally:
            self._under_way -= 1

    def _begin(self) -> None:
        while self._waiting and self._free:
            batch, items = list[tuple[gateway_pb2.PredictRequest, asyncio.Future[NDArray[np.float32]]]](), 0
            while self._waiting and items < _MOST_ITEMS:
                batch.append(self._waiting.pop(0))
                items += next(iter(batch[-1][0].payloads.values())).shape[0]
            self._free -= 1
            computed = asyncio.get_running_loop().run_in_executor(self._pool, self._compute, [one for one, _ in batch])
            computed.add_done_callback(lambda found, batch=batch: self._over(found, batch))  # type: ignore[misc]

    def _over(
        self,
        found: "asyncio.Future[list[NDArray[np.float32]]]",
        batch: list[tuple[gateway_pb2.PredictRequest, "asyncio.Future[NDArray[np.float32]]"]],
    ) -> None:
        self._free += 1
        for (_, done), output in zip(batch, found.result(), strict=True):
            if not done.done():
                done.set_result(output)
        self._begin()

    @torch.inference_mode()
    def _compute(self, requests: list[gateway_pb2.PredictRequest]) -> list[NDArray[np.float32]]:
        arrays = [{m: from_proto(request.payloads[m], m) for m in self._encoders} for request in requests]
        rows = {m: torch.from_numpy(np.concatenate([one[m] for one in arrays])) for m in self._encoders}
        output = self._fusion({m: encoder(rows[m]) for m, encoder in self._encoders.items()}).numpy()
        sizes = [len(next(iter(one.values()))) for one in arrays]
        return np.split(output, np.cumsum(sizes)[:-1])


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
