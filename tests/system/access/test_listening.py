"""Where services listen, and what that takes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mosel.client import Client
from mosel.config import FREE_PORTS, Settings
from mosel.errors import ConfigError
from mosel.launcher import Launcher
from tests.system.access.support import (
    Files,
)

Until = Callable[..., None]


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
    models_dir: Path, tmp_path: Path, private: dict[str, str], until: Until, command: tuple[str, ...], says: str
) -> None:
    environment = os.environ | private | {"MOSEL_MODELS_DIR": str(models_dir)}
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
