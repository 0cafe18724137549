"""Ordinary calls of tritonclient over gRPC, as a user of Triton writes them: grpc_calls.py HOST:PORT FOLDER.

Reads payloads from FOLDER/payloads.npz and writes what was answered to FOLDER/grpc.npz.
"""

import queue
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.system.triton.expecting import refused

Payloads = dict[str, NDArray[Any]]

MODEL = "fruit"
KIND = {"photo": "UINT8", "scent": "FP32"}


def inputs_of(payloads: Payloads) -> list[Any]:
    inputs = []
    for name, array in payloads.items():
        tensor = triton.InferInput(name, array.shape, KIND[name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def check_health(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("vegetable")


def check_metadata(client: Any) -> None:
    server = client.get_server_metadata(as_json=True)
    assert server["name"] == "mosel", server
    assert "statistics" in server["extensions"], server
    metadata = client.get_model_metadata(MODEL)
    assert {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs} == {
        "photo": ("UINT8", [-1, 24, 24, 3]),
        "scent": ("FP32", [-1, 6]),
    }
    assert metadata.outputs[0].name == "probabilities"
    config = client.get_model_config(MODEL).config
    assert config.max_batch_size == 1024
    assert all(tensor.optional for tensor in config.input), config
    assert config.HasField("dynamic_batching")
    assert float(config.parameters["accuracy.photo+scent"].string_value) > 0.8
    index = client.get_model_repository_index()
    assert [(model.name, model.state) for model in index.models] == [(MODEL, "READY")]


def check_statistics(client: Any) -> None:
    before = client.get_inference_statistics(MODEL).model_stats[0]
    scents = np.zeros((5, 6), np.float32)
    client.infer(MODEL, inputs_of({"scent": scents}))
    after = client.get_inference_statistics(MODEL).model_stats[0]
    assert after.inference_count == before.inference_count + 5
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    assert len(client.get_inference_statistics().model_stats) == 1


def infer(client: Any, payloads: Payloads) -> tuple[NDArray[Any], NDArray[Any]]:
    """Everything that one request can ask for."""
    result = client.infer(
        MODEL,
        inputs_of(payloads),
        model_version="1",
        request_id="mine",
        outputs=[triton.InferRequestedOutput(name) for name in ("modalities", "probabilities", "labels")],
        priority=2,
        timeout=20_000_000,
        client_timeout=30,
        parameters={"policy": "all", "min_accuracy": 0.5, "latency_slo_ms": 20_000, "late_ok": False},
    )
    response = result.get_response()
    assert response.id == "mine"
    assert response.parameters["modalities_used"].string_param == "photo+scent"
    assert response.parameters["expected_accuracy"].double_param > 0.8
    assert response.parameters["compute_ms"].double_param > 0
    assert result.as_numpy("modalities").tolist() == [b"photo+scent"] * len(payloads["photo"])
    return result.as_numpy("probabilities"), result.as_numpy("labels")


def infer_subsets(client: Any, payloads: Payloads) -> Any:
    """Inputs may be left out, and modalities that are sent need not be run."""
    alone = client.infer(MODEL, inputs_of({"scent": payloads["scent"]}))
    assert alone.get_response().parameters["modalities_used"].string_param == "scent"
    allowed = client.infer(MODEL, inputs_of(payloads), parameters={"modalities": "scent"})
    assert allowed.get_response().parameters["modalities_used"].string_param == "scent"
    np.testing.assert_allclose(allowed.as_numpy("probabilities"), alone.as_numpy("probabilities"), atol=1e-5)
    return alone.as_numpy("probabilities")


def infer_typed(address: str, payloads: Payloads) -> NDArray[Any]:
    """Values instead of bytes, through the generated stub."""
    request = service_pb2.ModelInferRequest(model_name=MODEL)
    for name, field in (("photo", "uint_contents"), ("scent", "fp32_contents")):
        tensor = request.inputs.add(name=name, datatype=KIND[name], shape=payloads[name].shape)
        getattr(tensor.contents, field).extend(payloads[name].ravel().tolist())
    with grpc.insecure_channel(address) as channel:
        response = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=30)
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(response.outputs[0].shape)


def infer_classes(client: Any, payloads: Payloads) -> Any:
    outputs = [triton.InferRequestedOutput("probabilities", class_count=2)]
    return client.infer(MODEL, inputs_of(payloads), outputs=outputs).as_numpy("probabilities")


def infer_later(client: Any, payloads: Payloads) -> Any:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.async_infer(MODEL, inputs_of(payloads), lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=30)
    assert error is None, error
    return result.as_numpy("probabilities")


def infer_stream(client: Any, payloads: Payloads) -> NDArray[Any]:
    """Each item as a request of its own; one of them is wrong."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for index in range(len(payloads["photo"])):
        item = {name: array[index : index + 1] for name, array in payloads.items()}
        client.async_stream_infer(MODEL, inputs_of(item), request_id=str(index))
    client.async_stream_infer("vegetable", inputs_of(payloads), request_id="wrong")
    client.async_stream_infer(MODEL, inputs_of(item), request_id="last")
    rows = []
    for index in range(len(payloads["photo"])):
        result, error = answers.get(timeout=30)
        assert error is None, error
        assert result.get_response().id == str(index)
        rows.append(result.as_numpy("probabilities")[0])
    _, error = answers.get(timeout=30)
    assert "model is 'vegetable'; expected one of fruit" in str(error), error
    result, error = answers.get(timeout=30)
    assert (error, result.get_response().id) == (None, "last")
    client.stop_stream()
    return np.array(rows)


def check_errors(client: Any, payloads: Payloads) -> None:
    scents = inputs_of({"scent": payloads["scent"]})
    refused("NOT_FOUND", "model is 'vegetable'; expected one of fruit", client.infer, "vegetable", scents)
    refused(
        "NOT_FOUND", "version of model 'fruit' is '7'; expected '1'", client.infer, MODEL, scents, model_version="7"
    )
    wrong_name = triton.InferInput("taste", [1, 6], "FP32").set_data_from_numpy(np.zeros((1, 6), np.float32))
    refused("INVALID_ARGUMENT", "inputs has 'taste'; expected some of photo, scent", client.infer, MODEL, [wrong_name])
    wrong_shape = triton.InferInput("scent", [1, 7], "FP32").set_data_from_numpy(np.zeros((1, 7), np.float32))
    refused("INVALID_ARGUMENT", "'scent'.shape is [1, 7]; expected [items, 6]", client.infer, MODEL, [wrong_shape])
    no_batch = triton.InferInput("scent", [6], "FP32").set_data_from_numpy(np.zeros(6, np.float32))
    refused("INVALID_ARGUMENT", "'scent'.shape is [6]; expected [items, 6]", client.infer, MODEL, [no_batch])
    wrong_dtype = triton.InferInput("scent", [1, 6], "FP64").set_data_from_numpy(np.zeros((1, 6)))
    refused("INVALID_ARGUMENT", "'scent'.datatype is FP64; expected FP32", client.infer, MODEL, [wrong_dtype])
    texts = triton.InferInput("scent", [1, 6], "BYTES").set_data_from_numpy(np.full((1, 6), b"text", object))
    refused("INVALID_ARGUMENT", "'scent'.datatype is BYTES; expected FP32", client.infer, MODEL, [texts])
    refused("INVALID_ARGUMENT", "inputs is empty; expected some of photo, scent", client.infer, MODEL, [])
    floor = {"min_accuracy": 0.9}
    refused("FAILED_PRECONDITION", "with photo as well, photo+scent has", client.infer, MODEL, scents, parameters=floor)
    large = triton.InferInput("scent", [1025, 6], "FP32").set_data_from_numpy(np.zeros((1025, 6), np.float32))
    refused("INVALID_ARGUMENT", "1025 items; expected at most 1024 in one job", client.infer, MODEL, [large])
    output = [triton.InferRequestedOutput("colour")]
    refused(
        "INVALID_ARGUMENT", "outputs[0] 'colour' is no output of 'fruit'", client.infer, MODEL, scents, outputs=output
    )
    unknown = {"min_acuracy": 1}
    refused("INVALID_ARGUMENT", "parameters has 'min_acuracy'", client.infer, MODEL, scents, parameters=unknown)
    refused("INVALID_ARGUMENT", "sequence_id is 3; expected none", client.infer, MODEL, scents, sequence_id=3)
    refused("UNIMPLEMENTED", "", client.get_system_shared_memory_status)
    shared = triton.InferInput("scent", [1, 6], "FP32")
    shared.set_shared_memory("region", 24)
    refused("INVALID_ARGUMENT", "has the parameter 'shared_memory_", client.infer, MODEL, [shared])


def main(address: str, folder: Path) -> None:
    with np.load(folder / "payloads.npz") as archive:
        payloads = dict(archive)
    with triton.InferenceServerClient(address) as client:
        check_health(client)
        check_metadata(client)
        check_statistics(client)
        probabilities, labels = infer(client, payloads)
        answers = {
            "probabilities": probabilities,
            "labels": labels.astype("U"),
            "subset": infer_subsets(client, payloads),
            "typed": infer_typed(address, payloads),
            "classes": infer_classes(client, payloads).astype("U"),
            "later": infer_later(client, payloads),
            "stream": infer_stream(client, payloads),
        }
        check_errors(client, payloads)
        check_health(client)
    np.savez(folder / "grpc.npz", **answers)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
