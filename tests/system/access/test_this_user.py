"""The commands, the tokens file while it changes, and the socket on which this user needs no token."""

import stat
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import grpc

from mosel.client import Client
from mosel.launcher import Launcher
from mosel.v1 import gateway_pb2
from tests.system.access.support import (
    Files,
    called,
    header,
    public_address,
)

Run = Callable[..., CompletedProcess[str]]
Until = Callable[..., None]
Draw = Callable[..., dict[str, Any]]


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
