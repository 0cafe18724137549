"""A client of the Open Inference Protocol, made from the gateway's own descriptors."""

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from gateway.inference.messages import SERVICE, ModelInferRequest, class_of
from mosel.tensors import name_of

_KINDS: Mapping[type, str] = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


def stub_of(channel: grpc.Channel | grpc.aio.Channel) -> Any:
    """A callable for each method."""
    calls: dict[str, Any] = {}
    for method in SERVICE.methods:
        make: Any = channel.stream_stream if method.client_streaming else channel.unary_unary
        request, response = class_of(method.input_type), class_of(method.output_type)
        calls[method.name] = make(f"/{SERVICE.full_name}/{method.name}", request.SerializeToString, response.FromString)
    return SimpleNamespace(**calls)


def infer_request(
    payloads: Mapping[str, NDArray[Any]],
    model: str = "fruit",
    id: str = "",
    outputs: Iterable[str] = (),
    **parameters: Any,
) -> Any:
    """A request with raw contents."""
    request = ModelInferRequest(model_name=model, id=id)
    for name, array in payloads.items():
        request.inputs.add(name=name, datatype=name_of(array.dtype), shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    for output in outputs:
        request.outputs.add(name=output)
    for name, value in parameters.items():
        setattr(request.parameters[name], _KINDS[type(value)], value)
    return request


def parameters_of(response: Any) -> dict[str, Any]:
    """The parameters of a response as plain values."""
    return {
        name: getattr(parameter, parameter.WhichOneof("parameter_choice"))
        for name, parameter in response.parameters.items()
    }


def array_of(response: Any, name: str) -> NDArray[Any]:
    """An output of a response as an array; BYTES as texts."""
    index = [output.name for output in response.outputs].index(name)
    output, raw = response.outputs[index], response.raw_output_contents[index]
    if output.datatype != "BYTES":
        return np.frombuffer(raw, {"FP32": "<f4"}[output.datatype]).reshape(tuple(output.shape))
    texts = []
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        texts.append(raw[4:end].decode())
        raw = raw[end:]
    return np.array(texts).reshape(tuple(output.shape))
