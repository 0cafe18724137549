"""Who may call real services: everything turned on at once, and what happens to those who are not let in."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from gateway.access.tenants import hash_of
from gateway.inference.messages import ModelStreamInferResponse
from mosel.client import Client
from mosel.config import FREE_PORTS, Settings
from mosel.errors import ConfigError
from mosel.launcher import Launcher
from mosel.tensors import from_proto, to_proto
from mosel.tls import Tls
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, service_pb2

Run = Callable[..., CompletedProcess[str]]
Until = Callable[..., None]
Draw = Callable[..., dict[str, Any]]
ENCODERS = ("photo", "scent")


@dataclass(frozen=True)
class Files:
    """Certificates of two authorities, and a tokens file."""

    folder: Path
    tokens: dict[str, str]

    def tls(self, ca: str = "public", certificate: str | None = "caller") -> Tls:
        return Tls(self.path(f"{ca}-ca.pem"), *(self.path(f"{certificate}.{end}") for end in ("pem", "key")))

    def path(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, run_mosel: Run) -> Files:
    folder = tmp_path_factory.mktemp("access")
    authorities = {name: trustme.CA() for name in ("public", "internal")}
    for name, ca in authorities.items():
        ca.cert_pem.write_to_path(str(folder / f"{name}-ca.pem"))
    for name, (authority, host) in {
        "gateway": ("public", "127.0.0.1"),
        "caller": ("public", "caller"),
        "service": ("internal", "127.0.0.1"),
    }.items():
        certificate = authorities[authority].issue_cert(host)
        certificate.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        certificate.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        (folder / f"{name}.key").chmod(0o600)
    tenants: dict[str, list[str]] = {
        "alice": [],
        "bob": ["--admin"],
        "carol": ["--requests-per-s", "0.01", "--burst", "1"],
        "erin": ["--requests-per-s", "0.01", "--burst", "2"],
    }
    made = {
        name: run_mosel("token", name, *limits, "--file", str(folder / "tokens.toml")).stdout.strip()
        for name, limits in tenants.items()
    }
    return Files(folder, made)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def secured(files: Files, settings_with: Callable[..., Settings]) -> Iterator[Launcher]:
    """Mutual TLS and tokens on a public address, and mutual TLS between services on TCP."""
    selector, fusion, *encoders = (f"127.0.0.1:{port}" for port in free_ports(2 + len(ENCODERS)))
    settings = settings_with(
        gateway=FREE_PORTS | {"host": "0.0.0.0", "tokens_file": files.path("tokens.toml")},
        tls={
            "certificate": files.path("gateway.pem"),
            "key": files.path("gateway.key"),
            "client_ca": files.path("public-ca.pem"),
        },
        internal_tls={
            "certificate": files.path("service.pem"),
            "key": files.path("service.key"),
            "ca": files.path("internal-ca.pem"),
        },
        selector={"address": selector},
        fusion={"address": fusion},
        encoders={"addresses": dict(zip(ENCODERS, encoders, strict=True))},
    )
    with Launcher(settings) as launcher:
        launcher.wait_ready(120)
        yield launcher


def public_address(launcher: Launcher) -> str:
    return f"127.0.0.1:{launcher.settings.gateway.grpc_port}"


def header(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


@contextlib.contextmanager
def called(launcher: Launcher, tls: Tls | None) -> Iterator[gateway_pb2_grpc.GatewayStub]:
    address = public_address(launcher)
    channel = grpc.insecure_channel(address)
    if tls is not None:
        channel.close()
        channel = grpc.secure_channel(address, tls.channel_credentials())
    with channel:
        yield gateway_pb2_grpc.GatewayStub(channel)


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code(), refused.value.details() or ""


def counted(launcher: Launcher) -> dict[str, int]:
    with Client(launcher.local_address) as client:
        return next(service.counters for service in client.status() if service.name == "gateway")


def logged(launcher: Launcher, name: str = "gateway") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in launcher.children[name].log.read_text().splitlines()]
    return [line for line in lines if line["message"] == "refused"]


def predict_request(payloads: dict[str, Any]) -> gateway_pb2.PredictRequest:
    tensors = {name: to_proto(array, name) for name, array in payloads.items()}
    return gateway_pb2.PredictRequest(model="fruit", payloads=tensors)


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
        if token == "carol":
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
    "method", ["/mosel.v1.Gateway/Status", "/inference.GRPCInferenceService/RepositoryModelLoad", "/any/UnloadModel"]
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


def test_this_user_needs_neither_token_nor_certificate_on_the_gateway_s_socket(
    secured: Launcher, draw: Draw, run_mosel: Run
) -> None:
    socket_file = Path(secured.local_address.removeprefix("unix:"))
    assert stat.S_IMODE(socket_file.parent.stat().st_mode) == 0o700
    with Client(secured.local_address) as client:
        assert client.predict("fruit", draw(3)).output.shape == (3, 3)
        assert {service.name for service in client.status()} == secured.children.keys()
    status = run_mosel("status", "--address", secured.local_address)
    assert (status.returncode, "encoder/photo" in status.stdout) == (0, True)


def test_commands_take_a_token_and_certificates(secured: Launcher, files: Files, run_mosel: Run) -> None:
    pair = ["--certificate", str(files.path("caller.pem")), "--key", str(files.path("caller.key"))]
    mutual = ["--address", public_address(secured), "--ca", str(files.path("public-ca.pem")), *pair]
    listed = run_mosel("models", *mutual, env={"MOSEL_TOKEN": files.tokens["alice"]})
    assert (listed.returncode, listed.stdout.startswith("fruit 1 (ready)")) == (0, True)
    assert run_mosel("status", *mutual, "--token", files.tokens["bob"]).returncode == 0
    for arguments, says in (
        (mutual, "header authorization is missing; expected 'Bearer' and a token"),
        ([*mutual, "--token", files.tokens["alice"]], "tenant alice is no admin; expected the token of one for "),
        (mutual[:2], f"service gateway at {public_address(secured)} is not reachable"),
        (
            ["--ca", str(files.path("internal-ca.pem")), *mutual[:2], *pair],
            f"service gateway at {public_address(secured)} is not reachable: TLS says CERTIFICATE_VERIFY_FAILED: ",
        ),
        ([*mutual[:4], *pair[:2]], "tls.key is missing; expected certificate and key, or neither"),
    ):
        refused = run_mosel("status", *arguments)
        assert (refused.returncode, refused.stdout) == (1, "")
        # Before it gRPC may have said something of its own.
        assert refused.stderr.splitlines()[-1].startswith(f"error: {says}")
    assert run_mosel("health", public_address(secured), *mutual[2:]).stdout == "SERVING\n"


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


def test_services_on_tcp_let_nobody_in_but_each_other(secured: Launcher, files: Files, until: Until) -> None:
    addresses = {
        "selector": secured.settings.selector_address,
        "fusion": secured.settings.fusion_address,
        "encoder/photo": secured.settings.encoder_address("photo"),
    }
    strangers = [None, Tls(files.path("internal-ca.pem")), files.tls("internal", "caller")]
    for name, address in addresses.items():
        lines = len(logged(secured, name))
        for tls in strangers:
            channel = (
                grpc.insecure_channel(address)
                if tls is None
                else grpc.secure_channel(address, tls.channel_credentials())
            )
            with channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                code, _ = refusal(lambda health=health: health.Check(health_pb2.HealthCheckRequest(), timeout=10))  # type: ignore[misc]
            assert code is grpc.StatusCode.UNAVAILABLE
        until(lambda name=name, lines=lines: len(logged(secured, name)) >= lines + 3, f"{name} has logged it")
        with grpc.secure_channel(address, files.tls("internal", "service").channel_credentials()) as channel:
            known: Any = health_pb2_grpc.HealthStub(channel)
            reply = known.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_new_tenant_is_known_soon_and_a_broken_file_changes_nothing(
    secured: Launcher, files: Files, run_mosel: Run, until: Until
) -> None:
    path = files.path("tokens.toml")
    with called(secured, files.tls()) as gateway:

        def may_call(token: str) -> bool:
            try:
                gateway.ListModels(gateway_pb2.ListModelsRequest(), metadata=header(token), timeout=10)
            except grpc.RpcError as error:
                return error.code() is not grpc.StatusCode.UNAUTHENTICATED
            return True

        dave = run_mosel("token", "dave", "--file", str(path)).stdout.strip()
        files.tokens["dave"] = dave
        until(lambda: may_call(dave), "the new tenant is known")
        good = path.read_text()
        path.write_text("[broken")
        log = secured.children["gateway"].log
        until(lambda: "tokens file not usable" in log.read_text(), "the broken file is noticed")
        assert may_call(dave)
        path.write_text(good.partition("[dave]")[0])
        until(lambda: not may_call(dave), "the tenant is gone")
        assert may_call(files.tokens["alice"])


def test_no_secret_is_in_any_log(secured: Launcher, files: Files, draw: Draw) -> None:
    with called(secured, files.tls()) as gateway:
        for token in (None, "a-wrong-token", *files.tokens.values()):
            with contextlib.suppress(grpc.RpcError):
                gateway.Predict(predict_request(draw(1)), metadata=header(token), timeout=30)
    logs = {name: child.log.read_text() for name, child in secured.children.items()}
    assert all(len(log) > 100 for log in logs.values())
    assert "refused" in logs["gateway"]
    secrets = ["a-wrong-token", "PRIVATE KEY", "Bearer"]
    for token in files.tokens.values():
        secrets += [token, token.removeprefix("mosel_"), hash_of(token)]
    for name, log in logs.items():
        assert [secret for secret in secrets if secret in log and secret != "Bearer"] == [], name
        # The word is in what a caller is told to send, and nothing follows it.
        assert re.search(r"Bearer\s+\S", log) is None, name
    for child in secured.children.values():
        arguments = (
            Path(f"/proc/{child.process.pid}/cmdline").read_bytes()
            + Path(f"/proc/{child.process.pid}/environ").read_bytes()
        )
        assert not [secret for secret in secrets[3:] if secret.encode() in arguments]


# Where it may listen


def test_the_launcher_does_not_open_a_port_to_others_without_both(
    settings_with: Callable[..., Settings], files: Files
) -> None:
    for gateway in ({}, {"tokens_file": files.path("tokens.toml")}):
        with pytest.raises(ConfigError, match=r"^--host: other machines can reach 0\.0\.0\.0:0, and there is no TLS"):
            Launcher(settings_with(gateway=FREE_PORTS | {"host": "0.0.0.0", **gateway}))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("gateway",), "--listen: other machines can reach 0.0.0.0:0, and there is no TLS (--tls-certificate and"),
        (("selector",), "selector.address: 0.0.0.0:0 is on a network, and there is no internal_tls"),
        (("fusion",), "fusion.address: 0.0.0.0:0 is on a network, and there is no internal_tls"),
        (("encoders", "--modality", "scent"), "encoders.addresses: 0.0.0.0:0 is on a network, and there is no int"),
    ],
)
def test_no_service_does_and_insecure_is_somebody_s_word_for_it(
    models_dir: Path, tmp_path: Path, until: Until, command: tuple[str, ...], says: str
) -> None:
    environment = os.environ | {"MOSEL_MODELS_DIR": str(models_dir), "MOSEL_RUN_DIR": str(tmp_path / "run")}
    arguments = [sys.executable, "-m", *command, "--listen", "0.0.0.0:0"]
    refused = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].partition("error: ")[2].startswith(says)

    log = tmp_path / "log"
    with (
        log.open("wb") as stream,
        subprocess.Popen(arguments, env=environment | {"MOSEL_GATEWAY__INSECURE": "true"}, stderr=stream) as process,
    ):
        until(lambda: '"listening"' in log.read_text() or process.poll() is not None, "it listens")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert re.search(r'"address": "0\.0\.0\.0:[1-9]', log.read_text())


def test_up_says_where_this_user_needs_no_token(
    models_dir: Path, mosel_command: Callable[..., list[str]], files: Files
) -> None:
    command = mosel_command("up", "--models", str(models_dir), "--host", "0.0.0.0", "--grpc-port", "0")
    alone = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (alone.returncode, alone.stdout) == (1, "")
    assert alone.stderr.startswith("error: --host: other machines can reach 0.0.0.0:0, and there is no TLS")

    certificate = ["--tls-certificate", str(files.path("gateway.pem")), "--tls-key", str(files.path("gateway.key"))]
    both = [*command, *certificate, "--tokens", str(files.path("tokens.toml"))]
    with subprocess.Popen(both, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        ready = next((line for line in process.stdout if line.startswith("ready: ")), "")
        assert ready.startswith("ready: gRPC on 0.0.0.0:")
        local = re.fullmatch(r"for this user alone, without a token: (unix:\S+)\n", process.stdout.readline())
        assert local is not None
        with Client(local[1]) as client:
            assert [model.name for model in client.models()] == ["fruit"]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
