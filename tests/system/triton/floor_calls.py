"""The most ordinary calls of tritonclient, of a model whose operator states a floor: floor_calls.py GRPC HTTP FOLDER.

Reads payloads from FOLDER/payloads.npz and writes what was said of each answer to FOLDER/floors.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

KIND = {"photo": "UINT8", "scent": "FP32"}


def inputs_of(triton: Any, payloads: dict[str, Any]) -> list[Any]:
    inputs = []
    for name, array in payloads.items():
        tensor = triton.InferInput(name, array.shape, KIND[name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def main(grpc_address: str, http_address: str, folder: Path) -> None:
    """Nothing of a floor is said here."""
    with np.load(folder / "payloads.npz") as archive:
        payloads = dict(archive)
    with tritonclient.grpc.InferenceServerClient(grpc_address) as client:
        answer = client.infer("fruit", inputs_of(tritonclient.grpc, payloads)).get_response()
    over_grpc = {
        name: getattr(parameter, parameter.WhichOneof("parameter_choice"))
        for name, parameter in answer.parameters.items()
    }
    with tritonclient.http.InferenceServerClient(http_address) as client:
        over_http = client.infer("fruit", inputs_of(tritonclient.http, payloads)).get_response()["parameters"]
    (folder / "floors.json").write_text(json.dumps({"grpc": over_grpc, "http": over_http}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
