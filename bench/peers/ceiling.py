"""The least that one Python process must do: gRPC, batches, one hand-off to a worker, encoders and fusion in one call.

No admission, no deadlines, no checks, no metrics: a yardstick, not a server. Prints its port once it listens.

python -m bench.peers.ceiling PACKAGE_FOLDER [--fast]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
import uvloop

from bench.null_model import NAME as NOTHING
from bench.one_process import Array, Batches, Compute, Payloads, compute_with, networks_of
from gateway.inference.messages import SERVICE, ModelInferRequest, ModelInferResponse
from mosel.config import load_settings
from mosel.packages.model_package import ModelPackage, load_package

_MOST_BYTES = 64 << 20


class Ceiling:
    """Serves ModelInfer of one model; the parameter `modalities` names what is run of it.

    Args:
        package: the model.
        fast: its networks are in the form that is fastest here.
    """

    def __init__(self, package: ModelPackage, *, fast: bool) -> None:
        self._output = package.output
        compute: Compute = self._nothing
        if package.name != NOTHING:
            compute = compute_with(*networks_of(package, load_settings(device="cpu"), fast=fast))
        self._batches = Batches(compute)

    async def infer(self, request: Any, context: Any) -> Any:
        """Answers one request."""
        payloads = {
            tensor.name: np.frombuffer(data, np.float32).reshape(tuple(tensor.shape))
            for tensor, data in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        named = request.parameters["modalities"].string_param if "modalities" in request.parameters else ""
        outputs = await self._batches.answer(named.split(",") if named else list(payloads), payloads)
        answer = ModelInferResponse(model_name=request.model_name)
        answer.outputs.add(name=self._output.name, datatype="FP32", shape=outputs.shape)
        answer.raw_output_contents.append(outputs.tobytes())
        return answer

    def _nothing(self, chosen: Sequence[str], jobs: Sequence[Payloads]) -> list[Array]:
        return [np.zeros((len(job[chosen[0]]), *self._output.shape), np.float32) for job in jobs]


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
