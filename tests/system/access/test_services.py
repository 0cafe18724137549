"""Services behind the gateway on TCP, and what all of them log."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.access.tenants import hash_of
from mosel.launcher import Launcher
from mosel.tls import Tls
from tests.system.access.support import (
    Files,
    called,
    header,
    predict_request,
    refusal,
)

Until = Callable[..., None]
Draw = Callable[..., dict[str, Any]]
# As gRPC itself writes it.
FAILED = "Handshake failed"


def test_services_on_tcp_let_nobody_in_but_each_other(secured: Launcher, files: Files, until: Until) -> None:
    addresses = {
        "selector": secured.settings.selector_address,
        "fusion": secured.settings.fusion_address,
        "encoder/photo": secured.settings.encoder_address("photo"),
    }
    strangers = [None, Tls(files.path("internal-ca.pem")), files.tls("internal", "caller")]
    for name, address in addresses.items():
        log = secured.children[name].log
        lines = log.read_text().count(FAILED)
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
        until(lambda log=log, lines=lines: log.read_text().count(FAILED) >= lines + 3, f"{name} has logged it")
        with grpc.secure_channel(address, files.tls("internal", "service").channel_credentials()) as channel:
            known: Any = health_pb2_grpc.HealthStub(channel)
            reply = known.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING


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
