"""The least that one Python process must do: gRPC, batches, one hand-off to a worker, encoders and fusion in one call.

No admission, no deadlines, no checks, no metrics: a yardstick, not a server. Prints its port once it listens.

python -m bench.peers.ceiling PACKAGE_FOLDER [--fast]
"""

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
import uvloop
from numpy.typing import NDArray

from bench.null_model import NAME as NOTHING
from gateway.inference.messages import SERVICE, ModelInferRequest, ModelInferResponse
from mosel.compute import networks
from mosel.compute.forms import Forms
from mosel.compute.networks import Loaded
from mosel.config import load_settings
from mosel.packages.model_package import ModelPackage, load_package

_WORKERS, _MOST_ITEMS, _MOST_BYTES = 2, 32, 64 << 20

Array = NDArray[Any]
Job = tuple[dict[str, Array], "asyncio.Future[Array]"]


class Ceiling:
    """Serves ModelInfer of one model; the parameter `modalities` names what is run of it.

    Args:
        package: the model.
        fast: its networks are in the form that is fastest here.
    """

    def __init__(self, package: ModelPackage, *, fast: bool) -> None:
        self._package, self._free = package, _WORKERS
        self._pool = ThreadPoolExecutor(_WORKERS, "compute", torch.set_num_threads, (1,))
        self._waiting: defaultdict[tuple[str, ...], list[Job]] = defaultdict(list)
        device = torch.device("cpu")
        forms = Forms(load_settings(device="cpu"), device)
        encoders = {m: Loaded.plain(package, networks.load_encoder(package, m, device)) for m in package.modalities}
        fusion = Loaded.plain(package, networks.load_fusion(package, device))
        if fast:
            encoders = {m: forms.of_encoder(encoder, m) for m, encoder in encoders.items()}
            fusion = forms.of_fusion(fusion)
        self._encoders, self._fusion = {m: encoder.network for m, encoder in encoders.items()}, fusion.network

    async def infer(self, request: Any, context: Any) -> Any:
        """Answers one request."""
        payloads = {
            tensor.name: np.frombuffer(data, np.float32).reshape(tuple(tensor.shape))
            for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        named = request.parameters["modalities"].string_param if "modalities" in request.parameters else ""
        answered: asyncio.Future[Array] = asyncio.get_running_loop().create_future()
        self._waiting[tuple(named.split(",")) if named else tuple(payloads)].append((payloads, answered))
        self._start()
        outputs = await answered
        answer = ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name=self._package.output.name, datatype="FP32", shape=outputs.shape)
        answer.raw_output_contents.append(outputs.tobytes())
        return answer

    def _start(self) -> None:
        for chosen, queue in self._waiting.items():
            while queue and self._free:
                jobs: list[Job] = []
                while queue and sum(map(_size, jobs)) < _MOST_ITEMS:
                    jobs.append(queue.pop(0))
                self._free -= 1
                payloads = [job[0] for job in jobs]
                done = asyncio.get_running_loop().run_in_executor(self._pool, self._compute, chosen, payloads)
                done.add_done_callback(partial(self._finished, jobs))

    def _finished(self, jobs: Sequence[Job], done: "asyncio.Future[list[Array]]") -> None:
        self._free += 1
        for (_, answered), outputs in zip(jobs, done.result(), strict=True):
            if not answered.done():
                answered.set_result(outputs)
        self._start()

    @torch.inference_mode()
    def _compute(self, chosen: Sequence[str], jobs: Sequence[Mapping[str, Array]]) -> list[Array]:
        sizes = [len(job[chosen[0]]) for job in jobs]
        if self._package.name == NOTHING:
            return [np.zeros((size, *self._package.output.shape), np.float32) for size in sizes]
        rows = {m: torch.from_numpy(np.concatenate([job[m] for job in jobs])) for m in chosen}
        outputs = self._fusion({m: self._encoders[m](rows[m]) for m in chosen}).numpy()
        return np.split(outputs, np.cumsum(sizes)[:-1])


def _size(job: Job) -> int:
    return len(next(iter(job[0].values())))


async def _serve(ceiling: Ceiling) -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", _MOST_BYTES)])
    request, response = ModelInferRequest.FromString, ModelInferResponse.SerializeToString
    handler = grpc.unary_unary_rpc_method_handler(ceiling.infer, request, response)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE.full_name, {"ModelInfer": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def main() -> None:
    """Serves until it is ended."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers.ceiling", description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--fast", action="store_true", help="networks in their fastest form")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    uvloop.run(_serve(Ceiling(load_package(arguments.package), fast=arguments.fast)))


if __name__ == "__main__":
    main()
