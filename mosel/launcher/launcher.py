"""Starts all services of one machine as child processes, starts those again that end, and stops them."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mosel.client import Client, ModelInfo, ServiceInfo
from mosel.config import GatewaySettings, Settings
from mosel.errors import ConfigError, MoselError, ServiceUnavailable
from mosel.launcher.backoff import Backoff
from mosel.packages.model_package import ModelPackage, find_packages
from mosel.runtime.exposure import check_public
from mosel.transport.control import remove_orphans

_POLL_S = 0.1
# Longer than the selector waits for a service that hangs.
_LOOK_TIMEOUT_S = 2.0
_LAST_LINE_BYTES = 4096
_MOST_LOG_BYTES = 64 * 1024 * 1024
# What the kernel gives to connections, /proc/sys/net/ipv4/ip_local_port_range; and below, what is tried for listeners.
_OWN_PORTS, _OWN_PORTS_FROM = Path("/proc/sys/net/ipv4/ip_local_port_range"), 32768
_LOWEST_PORT, _TRIED_PORTS = 20_000, 64
# Called with the names of the services that are ready and of those that are not.
Progress = Callable[[list[str], list[str]], None]

# A network's large temporaries would go back to the kernel after each call and be faulted in again in the next one.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}


@dataclass(frozen=True)
class Child:
    """One service: its name, the module and the arguments that it runs, its process, and its log.

    Attributes:
        log: the file that holds its log, and that of processes before it.
        log_start: where in the file its own log begins, in bytes.
    """

    name: str
    command: tuple[str, ...]
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int

    def ending(self) -> str:
        """How it ended, and the last line that it logged."""
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self.name} {how}: {self._last_line()}"

    def _last_line(self) -> str:
        with self.log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            # A log that has become too long was cut.
            own = self.log_start if self.log_start <= size else 0
            stream.seek(max(own, size - _LAST_LINE_BYTES))
            lines = stream.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"


class Launcher:
    """All services in one or several child processes; a context manager that leaves no process, socket or file behind.

    Args:
        settings: the effective settings; `run_dir` is replaced by a private folder of this launcher.

    Attributes:
        settings: as the services have them.
        services: their names.
        children: the processes by name, in starting order: `mosel` with all services, or one for each of them.
        restarts: how often each was started again, by name.

    Raises:
        ConfigError: the platform cannot run the services, or a setting is wrong.
        PackageError: a model package is wrong.
    """

    def __init__(self, settings: Settings) -> None:
        if not sys.platform.startswith("linux"):
            raise ConfigError(
                f"the services need Linux, and this is {sys.platform}: run them in a Linux container "
                "(README, 'Other platforms'); the Python client mosel.Client works here"
            )
        check_public(settings, settings.gateway_address, "--host")
        self.packages = find_packages(settings.models_dir.resolve(), settings.models)
        ports = {name: _usable_port(settings.gateway, name) for name in ("grpc_port", "http_port", "metrics_port")}
        self._folder = Path(tempfile.mkdtemp(prefix="mosel-", dir=_runtime_folder()))
        self.settings = settings.model_copy(
            update={
                "models_dir": settings.models_dir.resolve(),
                "run_dir": self._folder,
                "parent_pid": os.getpid(),
                "gateway": settings.gateway.model_copy(update=ports),
            }
        )
        self.services: list[str] = []
        self.children: dict[str, Child] = {}
        self.restarts: Counter[str] = Counter()
        self._backoffs: defaultdict[str, Backoff] = defaultdict(Backoff)
        # When those that have ended are started again, and since when everything or not everything is ready; all on the
        # monotonic clock.
        self._due: dict[str, float] = {}
        self._ready_since: float | None = None
        self._away_since: float | None = None

    @property
    def address(self) -> str:
        """The gateway's address."""
        return self.settings.gateway_address

    @property
    def local_address(self) -> str:
        """The gateway's socket for this user, who needs no token and no certificate there."""
        return self.settings.local_gateway_address

    @property
    def http_address(self) -> str:
        """Where the gateway speaks HTTP."""
        return self.settings.http_address

    @property
    def metrics_address(self) -> str:
        """Where all services' metrics are."""
        return f"http://{self.settings.gateway.host}:{self.settings.gateway.metrics_port}/metrics"

    def __enter__(self) -> "Launcher":
        try:
            encoders = encoders_here(self.settings, self.packages.values())
            self.services = ["fusion", *(f"encoder/{lane}" for lane in encoders), "selector", "gateway"]
            if self.settings.placement == "single":
                self._start("mosel", "mosel.launcher.single")
            else:
                self._start("fusion", "fusion")
                for lane, (modality, number) in encoders.items():
                    self._start(f"encoder/{lane}", "encoders", "--modality", modality, "--replica", str(number))
                self._start("selector", "selector")
                self._start("gateway", "gateway")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def wait_ready(self, timeout_s: float, progress: Progress = lambda ready, waiting: None) -> list[ModelInfo]:
        """Waits until every model is ready.

        Args:
            timeout_s: seconds to wait at most.
            progress: told which services are ready, now and then.

        Returns:
            The models as the gateway describes them.

        Raises:
            ServiceUnavailable: a service ended, or not all were ready in time; gives its last log line.
        """
        ready: set[str] = set()
        details: dict[str, str] = {}
        until = time.monotonic() + timeout_s
        with Client(self.local_address, retries=None) as client:
            while time.monotonic() < until:
                for child in self.ended():
                    raise ServiceUnavailable(child.ending())
                services, models = _look(client)
                ready = {service.name for service in services if service.ready}
                details |= {service.name: f"({service.detail})" for service in services if service.detail}
                progress([n for n in self.services if n in ready], [n for n in self.services if n not in ready])
                if self._all_ready(services, models):
                    self._ready_since = time.monotonic()
                    return models
                time.sleep(_POLL_S)
        waiting = ", ".join(f"{n} {details.get(n, '')}".strip() for n in self.services if n not in ready)
        raise ServiceUnavailable(f"not ready after {timeout_s:.0f} s: {waiting or 'measuring latencies'}")

    def is_ready(self) -> bool:
        """Whether every service is ready now, and every modality set of every model can be run."""
        with Client(self.local_address, retries=None) as client:
            return self._all_ready(*_look(client))

    def supervise(self) -> list[str]:
        """Starts services again that have ended, each after a pause that grows while it keeps ending.

        To be called several times a second, by a thread that lives as long as the services; waits for none of them.

        Returns:
            What has happened since the last call, a line each.
        """
        now, news = time.monotonic(), []
        # Starting does not count: on a busy machine it takes long to fail.
        ran_s = now - (self._ready_since or now)
        for child in self.ended():
            if child.name not in self._due:
                self._ready_since, self._away_since = None, self._away_since or now
                pause_s = self._postpone(child.name, now, ran_s)
                news.append(f"{child.ending()} (starting it again in {pause_s:g} s)")
        for name in [name for name, due in self._due.items() if due <= now]:
            try:
                self.start_again(name)
            except OSError as error:
                pause_s = self._postpone(name, now, 0)
                news.append(f"{name} cannot be started: {error} (trying again in {pause_s:g} s)")
        if self._away_since and not self._due and self.is_ready():
            self._ready_since = time.monotonic()
            news.append(f"everything is ready again, after {self._ready_since - self._away_since:.1f} s")
            self._away_since = None
        return news

    def start_again(self, name: str) -> Child:
        """Starts a service that has ended with the same settings, ports and log; returns at once."""
        self._start(name, *self.children[name].command)
        self._due.pop(name, None)
        self.restarts[name] += 1
        return self.children[name]

    def _postpone(self, name: str, now: float, ran_s: float) -> float:
        pause_s = self._backoffs[name].pause_s(ran_s)
        self._due[name] = now + pause_s
        return pause_s

    def ended(self) -> list[Child]:
        """Services that are no longer running."""
        return [child for child in self.children.values() if child.process.poll() is not None]

    def trim_logs(self) -> None:
        """Forgets logs that have grown large: where they are kept, they take memory."""
        for child in self.children.values():
            if child.log.stat().st_size > _MOST_LOG_BYTES:
                os.truncate(child.log, 0)

    def _all_ready(self, services: list[ServiceInfo], models: list[ModelInfo]) -> bool:
        ready = {service.name for service in services if service.ready}
        runs = all(model.ready and all(info.available for info in model.sets.values()) for model in models)
        return bool(models) and runs and ready.issuperset(self.services)

    def _start(self, name: str, module: str, *arguments: str) -> None:
        log = self._folder / f"{name.replace('/', '-')}.log"
        # Appended to, so that it can be cut while it is written.
        with log.open("ab") as stream, _uninterrupted():
            log_start = stream.tell()
            process = subprocess.Popen(  # noqa: S603
                # -P: a file fusion.py in the folder that the user happens to be in must not be run.
                [sys.executable, "-P", "-m", module, *arguments],
                env=_KEEP_MEMORY | os.environ | self.settings.as_environment(),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                # Ctrl-C goes to the launcher alone, which stops the services in order.
                start_new_session=True,
            )
            self.children[name] = Child(name, (module, *arguments), process, log, log_start)

    def _stop(self) -> None:
        """Stops the edge first, so that what was admitted can finish behind it; interrupted, it kills the rest."""
        behind = [name for name in self.children if name not in ("gateway", "selector")]
        try:
            for names in (["gateway"], ["selector"], behind):
                self._terminate([self.children[name] for name in names if name in self.children])
        finally:
            for child in self.children.values():
                child.process.kill()
                child.process.wait()
            remove_orphans(self.settings.transport.shm_dir)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _terminate(self, children: list[Child]) -> None:
        for child in children:
            child.process.terminate()
        until = time.monotonic() + self.settings.stop_grace_ms / 1000 + 2
        for child in children:
            try:
                child.process.wait(max(until - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the body is over: nobody would stop a child that is not known yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = list[int]()
    previous = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for raised in came:
            signal.raise_signal(raised)


def encoders_here(settings: Settings, packages: Iterable[ModelPackage]) -> dict[str, tuple[str, int]]:
    """The encoders that this machine runs for some packages: modality, and number counted from 1, by lane."""
    encoders: dict[str, tuple[str, int]] = {}
    for modality in sorted({modality for package in packages for modality in package.modalities}):
        lanes = settings.encoder_addresses(modality)
        for number, lane in enumerate(islice(lanes, settings.encoders.replicas.get(modality, 1)), 1):
            encoders[lane] = modality, number
    return encoders


def _look(client: Client) -> tuple[list[ServiceInfo], list[ModelInfo]]:
    """Every service and model as the gateway sees them; none while it is away."""
    try:
        return client.status(_LOOK_TIMEOUT_S), client.models(_LOOK_TIMEOUT_S)
    except MoselError:
        return [], []


def _runtime_folder() -> str:
    """A folder for sockets: short, and private where the system has one."""
    private = os.environ.get("XDG_RUNTIME_DIR", "")
    return private if os.access(private, os.W_OK) else tempfile.gettempdir()


def _free_port(host: str) -> int:
    """A free port that the kernel gives to nobody by itself: it stays free until a gateway listens there."""
    first = int(_OWN_PORTS.read_text().split()[0]) if _OWN_PORTS.exists() else _OWN_PORTS_FROM
    below = range(_LOWEST_PORT, first)
    for port in random.sample(below, min(_TRIED_PORTS, len(below))):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    return 0


def _usable_port(gateway: GatewaySettings, name: str) -> int:
    """The port that a setting names, or a free one for 0.

    Raises:
        ConfigError: nobody can listen there.
    """
    host, port = gateway.host, getattr(gateway, name) or _free_port(gateway.host)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            flag = f"--host {host}" if isinstance(error, socket.gaierror) else f"--{name.replace('_', '-')} {port}"
            raise ConfigError(f"{flag}: cannot listen on {host}:{port}: {error.strerror}") from None
        return int(probe.getsockname()[1])
