"""Certificates, tokens, and calls as somebody."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from mosel.client import Client
from mosel.launcher import Launcher
from mosel.tensors import to_proto
from mosel.tls import Tls
from mosel.v1 import gateway_pb2, gateway_pb2_grpc

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
