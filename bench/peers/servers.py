"""Starts who takes part, each until the end of the run. Triton and KServe only where they are installed."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import grpc

from bench.null_model import NAME as NOTHING
from bench.peers.contestants import (
    CEILING,
    CEILING_FAST,
    CEILING_NOTHING,
    DIGITS,
    DIGITS_FAST,
    KSERVE,
    TRITON,
)
from gateway.inference.messages import SERVICE, class_of
from mosel.config import FREE_PORTS, PLACEMENTS, load_settings
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage

_FOREIGN = Path(__file__).with_name("foreign")
_READY_S, _STOP_S = 300.0, 10.0
_CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 64
input [{inputs}]
output [{{name: "{output}" data_type: TYPE_FP32 dims: {shape}}}]
dynamic_batching {{}}
instance_group [{{kind: KIND_CPU count: 2}}]
"""


class NotInstalled(Exception):
    """There is no such server here; says what is missing."""


class Servers:
    """Starts servers by name; a context manager that stops them.

    Args:
        packages: `digits` and the model that does nothing, by name.
        peers: the folder that `bench/peers/foreign/install` filled; None: there is none.
        folder: for what servers write.
    """

    def __init__(self, packages: Mapping[str, ModelPackage], peers: Path | None, folder: Path) -> None:
        self._packages, self._peers, self._folder = packages, peers, folder
        self._stack = contextlib.ExitStack()
        self._addresses: dict[str, str] = {}

    def __enter__(self) -> "Servers":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def start(self, name: str) -> str:
        """The address of a server that is ready, started now if it was not yet.

        Raises:
            NotInstalled: Triton or KServe is not there.
        """
        if name not in self._addresses:
            self._addresses[name] = self._stack.enter_context(self._started(name))
        return self._addresses[name]

    @contextlib.contextmanager
    def _started(self, name: str) -> Iterator[str]:
        if name.partition("-")[0] in PLACEMENTS:
            settings = load_settings(
                models_dir=self._packages[NOTHING if name.endswith(NOTHING) else DIGITS].folder.parent,
                models=(NOTHING if name.endswith(NOTHING) else DIGITS,),
                placement=name.partition("-")[0],
                gateway=FREE_PORTS,
                selector={"floor_confidence": 0.5},
            )
            with Launcher(settings) as launcher:
                launcher.wait_ready(_READY_S)
                yield launcher.address
            return
        with self._triton() if name == TRITON else self._kserve() if name == KSERVE else self._ceiling(name) as address:
            yield address

    @contextlib.contextmanager
    def _ceiling(self, name: str) -> Iterator[str]:
        package = self._packages[{CEILING: DIGITS, CEILING_FAST: DIGITS, CEILING_NOTHING: NOTHING}[name]]
        command = [sys.executable, "-m", "bench.peers.ceiling", str(package.folder)]
        with self._process(name, [*command, "--fast"] if name == CEILING_FAST else command, os.environ) as output:
            yield f"127.0.0.1:{int(output.readline())}"

    @contextlib.contextmanager
    def _triton(self) -> Iterator[str]:
        environment = self._environment(TRITON)
        packages = next(environment.glob("lib/python3*/site-packages"))
        repository = self._folder / "triton"
        for model in (DIGITS, DIGITS_FAST, NOTHING):
            self._write_model(repository / model, model)
        http, own, metrics = (_free_port() for _ in range(3))
        command = [str(packages / "pytriton/tritonserver/bin/tritonserver"), "--model-repository", str(repository)]
        command += ["--backend-directory", str(environment.parent / "backends")]
        for kind, port in (("http", http), ("grpc", own), ("metrics", metrics)):
            command += [f"--{kind}-address", "127.0.0.1", f"--{kind}-port", str(port)]
        libraries = (environment / "libraries").read_text().strip()
        variables = os.environ | {
            "LD_LIBRARY_PATH": f"{libraries}:{packages / 'nvidia_pytriton.libs'}",
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(packages),
            "DIGITS_PACKAGE": str(self._packages[DIGITS].folder.resolve()),
        }
        with self._process(TRITON, command, variables):
            _wait_ready(address := f"127.0.0.1:{own}", (DIGITS, DIGITS_FAST, NOTHING))
            yield address

    @contextlib.contextmanager
    def _kserve(self) -> Iterator[str]:
        python, own = self._environment(KSERVE) / "bin/python", _free_port()
        command = [str(python), str(_FOREIGN / "kserve_nothing.py"), str(own), str(_free_port())]
        with self._process(KSERVE, command, os.environ):
            _wait_ready(address := f"127.0.0.1:{own}", (NOTHING,))
            yield address

    def _environment(self, peer: str) -> Path:
        if self._peers is None:
            raise NotInstalled("not installed (--peers)")
        if not (environment := self._peers / peer).is_dir():
            raise NotInstalled(f"not installed in {self._peers}")
        return environment.resolve()

    def _write_model(self, folder: Path, name: str) -> None:
        (folder / "1").mkdir(parents=True)
        package = self._packages[NOTHING if name == NOTHING else DIGITS]
        optional = " optional: true" if name == DIGITS_FAST else ""
        inputs = (
            f'{{name: "{modality}" data_type: TYPE_FP32 dims: {list(spec.shape)}{optional}}}'
            for modality, spec in package.modalities.items()
        )
        output = {"output": package.output.name, "shape": list(package.output.shape)}
        (folder / "config.pbtxt").write_text(_CONFIG.format(name=name, inputs=", ".join(inputs), **output))
        (folder / "1/model.py").write_text((_FOREIGN / "triton_model.py").read_text())

    @contextlib.contextmanager
    def _process(self, name: str, command: list[str], environment: Mapping[str, str]) -> Iterator[IO[str]]:
        """A server whose words go to a file; gives what it prints."""
        with (self._folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None, "there is a pipe"
        try:
            yield process.stdout
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def _wait_ready(address: str, models: tuple[str, ...]) -> None:
    """Waits until a server says that its models are ready.

    Raises:
        TimeoutError: it does not.
    """
    method = SERVICE.methods_by_name["ModelReady"]
    request: Any = class_of(method.input_type)
    reply: Any = class_of(method.output_type)
    until = time.monotonic() + _READY_S
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        ready = channel.unary_unary(f"/{SERVICE.full_name}/ModelReady", request.SerializeToString, reply.FromString)
        for model in models:
            while time.monotonic() < until:
                with contextlib.suppress(grpc.RpcError):
                    if ready(request(name=model), timeout=5.0).ready:
                        break
                time.sleep(0.2)
            else:
                raise TimeoutError(f"{model} at {address} is not ready after {_READY_S:g} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
