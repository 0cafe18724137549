"""The Open Inference Protocol over gRPC with real services; `test_tritonclient.py` has the usual client's view."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from numpy.typing import NDArray

from gateway.inference.messages import SERVICE, message
from mosel.config import Settings
from mosel.launcher import Launcher
from tests.gateway.inference.support import array_of, infer_request, parameters_of, stub_of

PLACEMENTS = ("single", "services")
Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[..., NDArray[Any]]
# A call whose request and reply are bytes.
Raw: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"

UNARY = [method.name for method in SERVICE.methods if not method.client_streaming]


@pytest.fixture
def channel(services: Launcher) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(services.address) as channel:
        yield channel


def test_reflection_shows_the_true_names_of_all_protocols(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    pool = descriptor_pool.DescriptorPool(database)
    expected = {
        "inference.GRPCInferenceService": ("ModelInfer", "inference.ModelInferRequest"),
        "mosel.v1.Gateway": ("Predict", "mosel.v1.PredictRequest"),
        "grpc.health.v1.Health": ("Check", "grpc.health.v1.HealthCheckRequest"),
        "grpc.reflection.v1.ServerReflection": (
            "ServerReflectionInfo",
            "grpc.reflection.v1.ServerReflectionRequest",
        ),
        "grpc.reflection.v1alpha.ServerReflection": (
            "ServerReflectionInfo",
            "grpc.reflection.v1alpha.ServerReflectionRequest",
        ),
    }
    assert {*database.get_services()} == {*expected}
    for service, (method, request) in expected.items():
        assert pool.FindServiceByName(service).methods_by_name[method].input_type.full_name == request


def asked_by_reflection(channel: grpc.Channel, version: str, symbol: str) -> Any:
    """What is said of the file with a symbol, as tools ask it."""
    ask = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    (answer,) = ask(iter([question]), timeout=30)
    return answer


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
@pytest.mark.parametrize(
    "symbol",
    [
        "mosel.v1.Gateway.Predict",
        "mosel.v1.Gateway",
        "mosel.v1.PredictRequest",
        "inference.GRPCInferenceService.ModelInfer",
    ],
)
def test_reflection_finds_methods_as_ghz_grpcurl_and_k6_ask_for_them(
    channel: grpc.Channel, version: str, symbol: str
) -> None:
    answer = asked_by_reflection(channel, version, symbol)
    pool = descriptor_pool.DescriptorPool()
    for file in reversed(answer.file_descriptor_response.file_descriptor_proto):
        pool.AddSerializedFile(file)
    found = pool.FindFileContainingSymbol(symbol.removesuffix(".Predict").removesuffix(".ModelInfer"))
    assert symbol.startswith(f"{found.package}.")


@pytest.mark.parametrize("symbol", ["mosel.v1.Gateway.Divine", "mosel.v1.Oracle.Predict", "Predict", ""])
def test_reflection_does_not_find_what_is_not_there(channel: grpc.Channel, symbol: str) -> None:
    answer = asked_by_reflection(channel, "v1", symbol)
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_each_floor_gets_the_sets_that_meet_it(channel: grpc.Channel, draw: Draw, directly: Directly) -> None:
    stub, payloads = stub_of(channel), draw(5, seed=4)
    outputs = ("probabilities", "modalities")
    # What mixes cost is measured, and some items with their photos alone do not take the mean below 0.9.
    for floor, allowed in ((0.9, {"photo", "photo+scent"}), (0.0, {"photo", "scent", "photo+scent"})):
        response = stub.ModelInfer(infer_request(payloads, outputs=outputs, min_accuracy=floor), timeout=30)
        sets, rows = array_of(response, "modalities"), array_of(response, "probabilities")
        assert {*sets} <= allowed
        assert parameters_of(response)["modalities_used"] == ",".join(sorted({*sets}))
        assert parameters_of(response)["expected_accuracy"] >= floor
        for used in {*sets}:
            chosen = sets == used
            np.testing.assert_allclose(rows[chosen], directly(payloads, used.split("+"))[chosen], atol=1e-5)


def test_a_floor_that_needs_more_inputs_names_them(channel: grpc.Channel, draw: Draw) -> None:
    request = infer_request({"scent": draw(1)["scent"]}, min_accuracy=0.9)
    with pytest.raises(grpc.RpcError) as refused:
        stub_of(channel).ModelInfer(request, timeout=30)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    details = refused.value.details() or ""
    assert details.startswith("min_accuracy 0.9 cannot be met with scent; the best that could be had is 0.")
    assert "; with photo as well, photo+scent has 0.9" in details


@pytest.mark.parametrize("method", UNARY)
def test_bytes_that_are_no_message(channel: grpc.Channel, method: str) -> None:
    call: Raw = channel.unary_unary(f"/{SERVICE.full_name}/{method}")
    with pytest.raises(grpc.RpcError) as refused:
        call(b"\xff\xff not a message", timeout=20)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details() == f"the request's bytes are no message that {method} knows"


def test_methods_of_others_are_not_implemented(channel: grpc.Channel) -> None:
    for method in ("SystemSharedMemoryStatus", "CudaSharedMemoryRegister", "TraceSetting", "LogSettings"):
        call: Raw = channel.unary_unary(f"/{SERVICE.full_name}/{method}")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_models_are_unloaded_and_loaded_again(settings_with: Callable[..., Settings], draw: Draw) -> None:
    with Launcher(settings_with(placement="single")) as launcher:
        launcher.wait_ready(120)
        with grpc.insecure_channel(launcher.address) as channel:
            stub, request = stub_of(channel), infer_request(draw(1))

            def tell(method: str, model: str) -> None:
                getattr(stub, method)(message(f"{method}Request", {"model_name": model}), timeout=60)

            def state() -> str:
                (model,) = stub.RepositoryIndex(message("RepositoryIndexRequest", {}), timeout=30).models
                assert bool(model.reason) is (model.state != "READY")
                return f"{model.name} {model.state}"

            tell("RepositoryModelUnload", "fruit")
            assert state() == "fruit UNAVAILABLE"
            assert not stub.ModelReady(message("ModelReadyRequest", {"name": "fruit"}), timeout=30).ready
            assert stub.ServerLive(message("ServerLiveRequest", {}), timeout=30).live
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(request, timeout=30)
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
            tell("RepositoryModelLoad", "fruit")
            assert state() == "fruit READY"
            assert array_of(stub.ModelInfer(request, timeout=30), "probabilities").shape == (1, 3)
            for method in ("RepositoryModelLoad", "RepositoryModelUnload"):
                with pytest.raises(grpc.RpcError) as refused:
                    tell(method, "pear")
                assert refused.value.code() is grpc.StatusCode.NOT_FOUND
