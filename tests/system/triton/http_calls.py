"""Ordinary calls of tritonclient over HTTP, as a user of Triton writes them: http_calls.py HOST:PORT FOLDER.

Reads payloads from FOLDER/payloads.npz and writes what was answered to FOLDER/http.npz.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray

from tests.system.triton.expecting import refused

Payloads = dict[str, NDArray[Any]]

MODEL = "fruit"
KIND = {"photo": "UINT8", "scent": "FP32"}


def inputs_of(payloads: Payloads, binary: bool = True) -> list[Any]:
    inputs = []
    for name, array in payloads.items():
        tensor = triton.InferInput(name, array.shape, KIND[name])
        tensor.set_data_from_numpy(array, binary_data=binary)
        inputs.append(tensor)
    return inputs


def check_health(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("vegetable")


def check_metadata(client: Any) -> None:
    server = client.get_server_metadata()
    assert server["name"] == "mosel", server
    assert "binary_tensor_data" in server["extensions"], server
    metadata = client.get_model_metadata(MODEL)
    assert {tensor["name"]: (tensor["datatype"], tensor["shape"]) for tensor in metadata["inputs"]} == {
        "photo": ("UINT8", [-1, 24, 24, 3]),
        "scent": ("FP32", [-1, 6]),
    }
    config = client.get_model_config(MODEL)
    assert config["max_batch_size"] == 1024
    assert all(tensor["optional"] for tensor in config["input"]), config
    index = client.get_model_repository_index()
    assert [(model["name"], model["state"]) for model in index] == [(MODEL, "READY")]


def check_statistics(client: Any) -> None:
    before = client.get_inference_statistics(MODEL)["model_stats"][0]
    client.infer(MODEL, inputs_of({"scent": np.zeros((5, 6), np.float32)}))
    after = client.get_inference_statistics(MODEL)["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 5
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert len(client.get_inference_statistics()["model_stats"]) == 1


def infer(client: Any, payloads: Payloads, binary_inputs: bool, binary_outputs: bool) -> Any:
    """Everything that one request can ask for."""
    names = ("modalities", "probabilities", "labels")
    result = client.infer(
        MODEL,
        inputs_of(payloads, binary_inputs),
        model_version="1",
        request_id="mine",
        outputs=[triton.InferRequestedOutput(name, binary_data=binary_outputs) for name in names],
        priority=2,
        timeout=20_000_000,
        parameters={"policy": "all", "min_accuracy": 0.5, "latency_slo_ms": 20_000, "late_ok": False},
    )
    response = result.get_response()
    assert response["id"] == "mine"
    assert response["parameters"]["modalities_used"] == "photo+scent"
    assert response["parameters"]["expected_accuracy"] > 0.8
    sets = [f"{text.decode() if isinstance(text, bytes) else text}" for text in result.as_numpy("modalities")]
    assert sets == ["photo+scent"] * len(payloads["photo"])
    return result.as_numpy("probabilities")


def infer_subsets(client: Any, payloads: Payloads) -> Any:
    """Inputs may be left out, and modalities that are sent need not be run."""
    alone = client.infer(MODEL, inputs_of({"scent": payloads["scent"]}))
    assert alone.get_response()["parameters"]["modalities_used"] == "scent"
    allowed = client.infer(MODEL, inputs_of(payloads), parameters={"modalities": "scent"})
    assert allowed.get_response()["parameters"]["modalities_used"] == "scent"
    return alone.as_numpy("probabilities")


def infer_compressed(client: Any, payloads: Payloads) -> Any:
    compression = {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}
    return client.infer(MODEL, inputs_of(payloads), **compression).as_numpy("probabilities")


def infer_classes(client: Any, payloads: Payloads) -> Any:
    outputs = [triton.InferRequestedOutput("probabilities", class_count=2)]
    return client.infer(MODEL, inputs_of(payloads), outputs=outputs).as_numpy("probabilities")


def infer_later(client: Any, payloads: Payloads) -> Any:
    return client.async_infer(MODEL, inputs_of(payloads)).get_result(timeout=30).as_numpy("probabilities")


def check_errors(client: Any, payloads: Payloads) -> None:
    scents = inputs_of({"scent": payloads["scent"]})
    refused("404", "model is 'vegetable'; expected one of fruit", client.infer, "vegetable", scents)
    refused("404", "version of model 'fruit' is '7'; expected '1'", client.infer, MODEL, scents, model_version="7")
    wrong_name = triton.InferInput("taste", [1, 6], "FP32").set_data_from_numpy(np.zeros((1, 6), np.float32))
    refused("400", "inputs has 'taste'; expected some of photo, scent", client.infer, MODEL, [wrong_name])
    wrong_shape = triton.InferInput("scent", [1, 7], "FP32").set_data_from_numpy(np.zeros((1, 7), np.float32))
    refused("400", "'scent'.shape is [1, 7]; expected [items, 6]", client.infer, MODEL, [wrong_shape])
    wrong_dtype = triton.InferInput("scent", [1, 6], "FP64").set_data_from_numpy(np.zeros((1, 6)))
    refused("400", "'scent'.datatype is FP64; expected FP32", client.infer, MODEL, [wrong_dtype])
    floor = {"min_accuracy": 0.9}
    refused("422", "with photo as well, photo+scent has", client.infer, MODEL, scents, parameters=floor)
    large = triton.InferInput("scent", [1025, 6], "FP32").set_data_from_numpy(np.zeros((1025, 6), np.float32))
    refused("413", "1025 items; expected at most 1024 in one job", client.infer, MODEL, [large])
    output = [triton.InferRequestedOutput("colour")]
    refused("400", "outputs[0] 'colour' is no output of 'fruit'", client.infer, MODEL, scents, outputs=output)
    unknown = {"min_acuracy": 1}
    refused("400", "parameters has 'min_acuracy'", client.infer, MODEL, scents, parameters=unknown)


def main(address: str, folder: Path) -> None:
    with np.load(folder / "payloads.npz") as archive:
        payloads = dict(archive)
    with triton.InferenceServerClient(address) as client:
        check_health(client)
        check_metadata(client)
        check_statistics(client)
        answers = {
            "probabilities": infer(client, payloads, binary_inputs=True, binary_outputs=True),
            "json": infer(client, payloads, binary_inputs=False, binary_outputs=False),
            "mixed": infer(client, payloads, binary_inputs=False, binary_outputs=True),
            "compressed": infer_compressed(client, payloads),
            "subset": infer_subsets(client, payloads),
            "classes": infer_classes(client, payloads).astype("U"),
            "later": infer_later(client, payloads),
        }
        check_errors(client, payloads)
        check_health(client)
    np.savez(folder / "http.npz", **answers)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
