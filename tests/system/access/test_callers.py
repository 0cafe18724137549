"""Who may call a gateway over gRPC, and what happens to those who are not let in."""

import contextlib
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from gateway.inference.messages import ModelStreamInferResponse
from mosel.launcher import Launcher
from mosel.tensors import from_proto
from mosel.tls import Tls
from mosel.v1 import gateway_pb2, service_pb2
from tests.system.access.support import (
    ENCODERS,
    Files,
    called,
    counted,
    header,
    logged,
    predict_request,
    public_address,
    refusal,
)

Until = Callable[..., None]
Draw = Callable[..., dict[str, Any]]


def test_a_tenant_gets_the_answer_that_the_networks_give(
    secured: Launcher, files: Files, draw: Draw, directly: Callable[..., Any]
) -> None:
    payloads = draw(5)
    with called(secured, files.tls()) as gateway:
        for name in ("alice", "bob"):
            reply = gateway.Predict(predict_request(payloads), metadata=header(files.tokens[name]), timeout=30)
            answer: Any = from_proto(reply.output, "output")
            np.testing.assert_allclose(answer, directly(payloads, ENCODERS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("token", "status", "counter", "reason"),
    [
        (None, "UNAUTHENTICATED", "refused.unauthenticated", "header authorization is missing"),
        ("wrong", "UNAUTHENTICATED", "refused.unauthenticated", "header authorization has a token that is not known"),
        ("carol", "RESOURCE_EXHAUSTED", "refused.quota.carol", "tenant carol is beyond its requests_per_s of 0.01"),
    ],
)
def test_who_has_no_token_or_no_quota_left_is_refused_logged_and_counted(
    secured: Launcher, files: Files, token: str | None, status: str, counter: str, reason: str
) -> None:
    metadata = header(None if token is None else files.tokens.get(token, token))
    with called(secured, files.tls()) as gateway:
        with contextlib.suppress(grpc.RpcError):
            gateway.ListModels(gateway_pb2.ListModelsRequest(), metadata=metadata, timeout=30)
        before, lines = counted(secured).get(counter, 0), len(logged(secured))
        code, details = refusal(
            lambda: gateway.ListModels(gateway_pb2.ListModelsRequest(), metadata=metadata, timeout=30)
        )
    assert code.name == status
    assert details.startswith(reason)
    assert counted(secured)[counter] == before + 1
    (line,) = logged(secured)[lines:]
    assert line["reason"].startswith(reason)
    assert line["method"] == "/mosel.v1.Gateway/ListModels"
    assert line["peer"].startswith("ipv4:127.0.0.1:")
    assert line["tenant"] == ("carol" if token == "carol" else None)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("in plain text", "WRONG_VERSION_NUMBER"),
        ("without a certificate", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ("with the certificate of another authority", "CERTIFICATE_VERIFY_FAILED"),
    ],
)
def test_whom_tls_does_not_let_in_is_refused_logged_and_counted(
    secured: Launcher, files: Files, until: Until, how: str, reason: str
) -> None:
    ways = {
        "in plain text": None,
        "without a certificate": Tls(files.path("public-ca.pem")),
        "with the certificate of another authority": files.tls(certificate="service"),
    }
    before, lines = counted(secured).get("refused.handshake", 0), len(logged(secured))
    with called(secured, ways[how]) as gateway:
        metadata = header(files.tokens["alice"])
        code, _ = refusal(lambda: gateway.ListModels(gateway_pb2.ListModelsRequest(), metadata=metadata, timeout=10))
    assert code is grpc.StatusCode.UNAVAILABLE
    until(lambda: counted(secured)["refused.handshake"] > before, "the handshake is counted")
    until(lambda: len(logged(secured)) > lines, "the handshake is logged")
    assert {line["reason"] for line in logged(secured)[lines:]} == {f"TLS handshake failed: {reason}"}


def test_a_caller_refuses_a_gateway_that_its_authority_does_not_know(secured: Launcher, files: Files) -> None:
    with called(secured, files.tls(ca="internal")) as gateway:
        code, details = refusal(lambda: gateway.ListModels(gateway_pb2.ListModelsRequest(), timeout=10))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "CERTIFICATE_VERIFY_FAILED" in details


@pytest.mark.parametrize(
    "method",
    [
        "/mosel.v1.Gateway/Status",
        "/inference.GRPCInferenceService/RepositoryModelLoad",
        "/mosel.v1.Gateway/UnloadModel",
    ],
)
def test_what_only_admins_may_do_others_may_not(secured: Launcher, files: Files, method: str) -> None:
    before, lines = counted(secured).get("refused.permission", 0), len(logged(secured))
    with grpc.secure_channel(public_address(secured), files.tls().channel_credentials()) as channel:
        call: Any = channel.unary_unary(method)
        code, details = refusal(lambda: call(b"", metadata=header(files.tokens["alice"]), timeout=10))
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert details == f"tenant alice is no admin; expected the token of one for {method}"
    assert counted(secured)["refused.permission"] == before + 1
    assert logged(secured)[lines]["tenant"] == "alice"


def test_an_admin_sees_every_service_at_its_tcp_address(secured: Launcher, files: Files) -> None:
    with called(secured, files.tls()) as gateway:
        reply = gateway.Status(service_pb2.StatusRequest(), metadata=header(files.tokens["bob"]), timeout=30)
    addresses = {service.name: service.address for service in reply.services}
    assert addresses.keys() == secured.children.keys()
    assert all(address.startswith(("127.0.0.1:", "0.0.0.0:")) for address in addresses.values())


def test_a_job_is_its_tenant_s_alone(secured: Launcher, files: Files, draw: Draw) -> None:
    alice, bob = header(files.tokens["alice"]), header(files.tokens["bob"])
    with called(secured, files.tls()) as gateway:
        job_id = gateway.Predict(predict_request(draw(2)), metadata=alice, timeout=30).job_id
        ask = gateway_pb2.GetJobRequest(job_id=job_id)
        assert gateway.GetJob(ask, metadata=alice, timeout=10).state == gateway_pb2.ANSWERED
        for call, request in (
            (gateway.GetJob, ask),
            (gateway.CancelJob, gateway_pb2.CancelJobRequest(job_id=job_id)),
        ):
            code, details = refusal(lambda call=call, request=request: call(request, metadata=bob, timeout=10))  # type: ignore[misc]
            assert (code, details.partition(";")[0]) == (grpc.StatusCode.NOT_FOUND, f"job_id is '{job_id}'")


def test_health_is_open_and_reflection_is_not(secured: Launcher, files: Files) -> None:
    with grpc.secure_channel(public_address(secured), files.tls().channel_credentials()) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        for service in ("", "fruit"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        code, _ = refusal(lambda: ProtoReflectionDescriptorDatabase(channel).get_services())
        assert code is grpc.StatusCode.UNAUTHENTICATED


def test_an_admin_loads_models(secured: Launcher, files: Files) -> None:
    load = gateway_pb2.LoadModelRequest(model="fruit")
    with called(secured, files.tls()) as gateway:
        code, _ = refusal(lambda: gateway.LoadModel(load, metadata=header(files.tokens["alice"]), timeout=60))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert gateway.LoadModel(load, metadata=header(files.tokens["bob"]), timeout=60).name == "fruit"


def test_each_request_of_an_inference_stream_counts(secured: Launcher, files: Files) -> None:
    with grpc.secure_channel(public_address(secured), files.tls().channel_credentials()) as channel:
        infer: Any = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer", None, ModelStreamInferResponse.FromString
        )
        # One for the call, one for the first of its requests; the stream itself goes on.
        answers = list(infer(iter([b"\xff"] * 3), metadata=header(files.tokens["erin"]), timeout=30))
    first, *others = [answer.error_message for answer in answers]
    assert first.startswith("a request's bytes are no message")
    assert len(others) == 2
    assert all(other.startswith("tenant erin is beyond its requests_per_s of 0.01; try again in") for other in others)
