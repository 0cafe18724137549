"""Requests and responses of the Open Inference Protocol over HTTP, written without the code that is tested."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from mosel.tensors import DTYPES, name_of

LENGTH = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Body:
    """The body of a request, and the headers that go with it."""

    content: bytes
    headers: Mapping[str, str]


def infer_body(
    payloads: Mapping[str, NDArray[Any]],
    *,
    binary: bool = False,
    outputs: Sequence[Any] = (),
    id: str = "",
    **parameters: Any,
) -> Body:
    """A request with its tensors as JSON or as bytes behind it; outputs are names or objects."""
    content: dict[str, Any] = {"id": id, "parameters": parameters, "inputs": []}
    if outputs:
        content["outputs"] = [{"name": output} if isinstance(output, str) else output for output in outputs]
    for name, array in payloads.items():
        tensor: dict[str, Any] = {"name": name, "datatype": name_of(array.dtype), "shape": array.shape}
        how: dict[str, Any] = {"parameters": {"binary_data_size": array.nbytes}} if binary else {"data": array.tolist()}
        content["inputs"].append(tensor | how)
    text = json.dumps(content).encode()
    if not binary:
        return Body(text, {"Content-Type": "application/json"})
    return Body(b"".join((text, *(array.tobytes() for array in payloads.values()))), {LENGTH: str(len(text))})


def outputs_of(response: httpx.Response) -> dict[str, NDArray[Any]]:
    """The outputs of a response as arrays, BYTES as texts, whatever they came as."""
    assert response.status_code == 200, response.text
    size = int(response.headers.get(LENGTH, len(response.content)))
    content, behind = json.loads(response.content[:size]), response.content[size:]
    arrays: dict[str, NDArray[Any]] = {}
    for output in content["outputs"]:
        if "data" in output:
            arrays[output["name"]] = np.array(output["data"], DTYPES.get(output["datatype"])).reshape(output["shape"])
            continue
        nbytes = output["parameters"]["binary_data_size"]
        raw, behind = behind[:nbytes], behind[nbytes:]
        elements = texts_of(raw) if output["datatype"] == "BYTES" else np.frombuffer(raw, DTYPES[output["datatype"]])
        arrays[output["name"]] = elements.reshape(output["shape"])
    assert behind == b""
    return arrays


def texts_of(raw: bytes) -> NDArray[np.str_]:
    """Elements of BYTES, each behind its length."""
    texts = []
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        texts.append(raw[4:end].decode())
        raw = raw[end:]
    return np.array(texts)
