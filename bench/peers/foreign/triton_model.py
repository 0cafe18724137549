"""The models of the comparison as Triton's Python backend has them; runs in Triton's own environment.

`digits` runs every modality as its users would write it; `digits_fast` the same with encoders in optimised TorchScript,
and whatever inputs a request brings; `nothing` looks at its inputs and answers zeros.
"""

import importlib
import os
import sys
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as triton
from safetensors.torch import load_file

SHAPES = {"audio": (8000,), "image": (28, 28), "pen": (2, 2)}


class TritonPythonModel:
    """One instance, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the networks of the reference model."""
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.encoders: dict[str, Any] = {}
        if args["model_name"] == "nothing":
            return
        package = os.environ["DIGITS_PACKAGE"]
        sys.path.insert(0, package)
        networks = importlib.import_module("networks")
        weights = load_file(os.path.join(package, "weights.safetensors"))  # noqa: PTH118

        def filled(network: Any, prefix: str) -> Any:
            network.load_state_dict({k[len(prefix) :]: value for k, value in weights.items() if k.startswith(prefix)})
            return network.eval()

        classes = {"audio": networks.AudioEncoder, "image": networks.ImageEncoder, "pen": networks.PenEncoder}
        self.encoders = {name: filled(make(), f"encoders.{name}.") for name, make in classes.items()}
        self.fusion = filled(networks.Fusion(), "fusion.")
        if args["model_name"] == "digits_fast":
            self.encoders = {name: _fast(encoder, SHAPES[name]) for name, encoder in self.encoders.items()}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers a batch as Triton made it."""
        inputs: dict[str, list[Any]] = {}
        for name in SHAPES:
            sent = [triton.get_input_tensor_by_name(request, name) for request in requests]
            if all(tensor is not None for tensor in sent):
                inputs[name] = [tensor.as_numpy() for tensor in sent]
        sizes = [len(rows) for rows in next(iter(inputs.values()))]
        if self.encoders:
            rows = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in inputs.items()}
            fused = self.fusion({name: self.encoders[name](tensor) for name, tensor in rows.items()})
            outputs = np.split(fused.numpy(), np.cumsum(sizes)[:-1])
        else:
            outputs = [np.zeros((size, 10), np.float32) for size in sizes]
        return [triton.InferenceResponse([triton.Tensor("probabilities", rows)]) for rows in outputs]


def _fast(network: Any, shape: tuple[int, ...]) -> Any:
    traced = torch.jit.optimize_for_inference(
        torch.jit.trace(network, torch.zeros(4, *shape))  # type: ignore[no-untyped-call]
    )
    for rows in (1, 8, 32):
        for _ in range(3):
            traced(torch.zeros(rows, *shape))
    return traced
