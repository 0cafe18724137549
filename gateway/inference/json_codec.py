"""Between the JSON of the Open Inference Protocol, with the binary tensor extension, and its words."""

import json
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.inference.json_messages import InferRequestJson, InputJson, read
from gateway.inference.responses import raw_of
from gateway.inference.words import InferRequest, InferResponse, InputTensor, OutputTensor, Parameters
from mosel.errors import InvalidRequest

HEADER_LENGTH = "inference-header-content-length"

_BINARY_SIZE, _BINARY, _ALL_BINARY = "binary_data_size", "binary_data", "binary_data_output"
# JSON has no such numbers.
_BYTES_ONLY = {"FP16", "BF16"}
# Elements that are written at once, before other threads get their turn.
_CHUNK = 8192


@dataclass(frozen=True)
class Written:
    """The body of a response.

    Attributes:
        body: JSON, and behind it the bytes of outputs.
        json_bytes: how much of it is JSON; None: all.
    """

    body: bytes
    json_bytes: int | None


def json_bytes_of(header: str | None, body_bytes: int) -> int:
    """How much of a body is JSON.

    Args:
        header: what the caller says of it in `Inference-Header-Content-Length`; None: nothing.
        body_bytes: of the whole body.

    Raises:
        InvalidRequest: the header is no number, or more than there is.
    """
    if header is None:
        return body_bytes
    if not (header.isascii() and header.isdigit() and len(header) < 20 and int(header) <= body_bytes):
        shown = reprlib.repr(header)
        raise InvalidRequest(f"header {HEADER_LENGTH} is {shown}; expected at most the body's {body_bytes} bytes")
    return int(header)


def read_request(model: str, version: str, body: memoryview, json_bytes: int) -> InferRequest:
    """Reads a request; the tensors that came as bytes stay where they are.

    Args:
        model, version: of the path.
        body: the whole body.
        json_bytes: how much of it is JSON.

    Raises:
        InvalidRequest: it is none; says what is wrong. Names, shapes and data types are not checked.
    """
    message = read(body[:json_bytes], InferRequestJson)
    _check_flag("parameters", message.parameters, _ALL_BINARY)
    for index, output in enumerate(message.outputs):
        _check_flag(f"outputs[{index}] '{output.name}'", output.parameters, _BINARY)
    return InferRequest(
        model=model,
        version=version,
        id=message.id,
        parameters=message.parameters,
        inputs=list(_inputs(message.inputs, body[json_bytes:])),
        outputs=[output.name for output in message.outputs],
        output_parameters={output.name: output.parameters for output in message.outputs},
    )


def write_response(request: InferRequest, response: InferResponse) -> Written:
    """Writes a response, its outputs as JSON or as bytes as the request wants them.

    Raises:
        InvalidRequest: an output that is wanted as JSON has no form there.
    """
    outputs, parts = [], []
    for output in response.outputs:
        head = {"name": output.name, "datatype": output.datatype, "shape": output.array.shape}
        if _is_binary(request, output.name):
            parts.append(raw_of(output))
            outputs.append(_dumps(head | {"parameters": {_BINARY_SIZE: len(parts[-1])}}))
        else:
            outputs.append(f'{_dumps(head)[:-1]},"data":[{",".join(_chunks(output))}]}}')
    named = {"id": response.id} if response.id else {}
    named |= {"model_name": response.model, "model_version": response.version}
    text = f'{_dumps(named | {"parameters": response.parameters})[:-1]},"outputs":[{",".join(outputs)}]}}'.encode()
    return Written(b"".join((text, *parts)), len(text) if parts else None)


def _inputs(messages: Sequence[InputJson], behind: memoryview) -> Iterator[InputTensor]:
    start = 0
    for index, message in enumerate(messages):
        field, shape = f"inputs[{index}] '{message.name}'", tuple(message.shape)
        size = message.parameters.get(_BINARY_SIZE)
        if size is None:
            values = _values(message, field)
            yield InputTensor(message.name, message.datatype, shape, None, values, message.parameters)
            continue
        if message.data is not None:
            raise InvalidRequest(f"{field} has data and {_BINARY_SIZE}; expected one of them")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(behind) - start:
            left = len(behind) - start
            raise InvalidRequest(f"{field} has {_BINARY_SIZE} {size!r}; behind the JSON there are {left} bytes for it")
        raw = behind[start : start + size]
        yield InputTensor(message.name, message.datatype, shape, raw, (), message.parameters)
        start += size
    if start != len(behind):
        raise InvalidRequest(f"behind the JSON there are {len(behind)} bytes; expected {start}, as the inputs say")


def _values(message: InputJson, field: str) -> Sequence[object] | NDArray[np.generic]:
    """The elements, flat; as an array, which takes less memory, if they are numbers or booleans."""
    if message.data is None:
        raise InvalidRequest(f"{field} has no data; expected it, or {_BINARY_SIZE} among its parameters")
    values = _flat(message.data, message.shape, field)
    types = set(map(type, values))
    if types == {str} and message.datatype == "BYTES":
        return values
    if not (types <= {int, float} or types == {bool}):
        other = next(value for value in values if type(value) not in (int, float))
        raise InvalidRequest(
            f"{field} has {reprlib.repr(other)} in its data; expected numbers alone, or booleans alone"
        )
    return np.asarray(values)


def _flat(data: list[Any], shape: Sequence[int], field: str) -> list[Any]:
    """Row-major elements of data that is flat, or nested as its shape says."""
    if not data or type(data[0]) is not list:
        return data
    for size in shape[1:]:
        if set(map(type, data)) != {list} or set(map(len, data)) != {size}:
            raise InvalidRequest(
                f"{field} has data that is not nested as its shape {list(shape)}; expected that, or flat"
            )
        data = list(chain.from_iterable(data))
    return data


def _check_flag(field: str, parameters: Parameters, name: str) -> None:
    if not isinstance(parameters.get(name, False), bool):
        raise InvalidRequest(f"{field} has {name} {parameters[name]!r}; expected true or false")


def _is_binary(request: InferRequest, output: str) -> bool:
    every = request.parameters.get(_ALL_BINARY, False)
    return bool(request.output_parameters.get(output, {}).get(_BINARY, every))


def _chunks(output: OutputTensor) -> Iterator[str]:
    """The elements as JSON has them, in pieces without the brackets."""
    array = output.array
    if output.datatype in _BYTES_ONLY:
        raise InvalidRequest(
            f"output '{output.name}' is {output.datatype}, which JSON lacks; expected {_BINARY} for it"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(f"output '{output.name}' has nan or infinity, which JSON lacks; expected {_BINARY} for it")
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        values = flat[start : start + _CHUNK].tolist()
        if output.datatype == "BYTES":
            values = [value.decode() for value in values]
        yield _dumps(values)[1:-1]


def _dumps(content: object) -> str:
    return json.dumps(content, separators=(",", ":"))
