"""tritonclient's messages and the gateway's in one process, whichever comes first: coexistence.py theirs|ours."""

import importlib
import sys

import numpy as np

THEIRS, OURS = "tritonclient.grpc", "gateway.inference.conversions"


def main(first: str) -> None:
    """Each reads what the other has written."""
    for name in (THEIRS, OURS) if first == "theirs" else (OURS, THEIRS):
        importlib.import_module(name)
    from tritonclient.grpc import InferInput, InferResult, service_pb2
    from tritonclient.grpc._utils import _get_inference_request

    from gateway.inference.conversions import message_from, request_from
    from gateway.inference.messages import ModelInferRequest
    from gateway.inference.words import InferResponse, OutputTensor

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = InferInput("x", [2, 3], "FP32").set_data_from_numpy(array)
    named = {"model_name": "fruit", "model_version": "1", "request_id": "7", "outputs": None, "sequence_id": 0}
    rest = {
        "sequence_start": False,
        "sequence_end": False,
        "priority": 3,
        "timeout": 9,
        "parameters": {"policy": "all"},
    }
    written = _get_inference_request(inputs=[tensor], **named, **rest).SerializeToString()
    request = request_from(ModelInferRequest.FromString(written))
    assert (request.model, request.id, request.inputs[0].raw) == ("fruit", "7", array.tobytes())
    assert request.parameters == {"priority": 3, "timeout": 9, "policy": "all"}

    texts = np.array([b"a", b"bc"], object)
    outputs = [OutputTensor("y", "FP32", array), OutputTensor("modalities", "BYTES", texts)]
    answer = message_from(InferResponse("fruit", "1", "7", {"queue_ms": 0.5}, outputs)).SerializeToString()
    result = InferResult(service_pb2.ModelInferResponse.FromString(answer))
    np.testing.assert_array_equal(result.as_numpy("y"), array)
    assert result.as_numpy("modalities").tolist() == [b"a", b"bc"]
    assert result.get_response().parameters["queue_ms"].double_param == 0.5


if __name__ == "__main__":
    main(sys.argv[1])
