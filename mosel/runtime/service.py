"""What every service does the same way: listen, answer health checks, turn errors into statuses, stop on a signal."""

import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import signal
import socket
import sys
import threading
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

import grpc
import uvloop
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2_grpc

from mosel.config import Placement, Settings, load_settings
from mosel.deadline import Deadline
from mosel.errors import ConfigError, InvalidRequest, MoselError, PayloadTooLarge, ServiceUnavailable
from mosel.observability.logs import configure_logs, flush_logs
from mosel.runtime import leftovers
from mosel.runtime.channels import PINGS_OF_CALLERS, channel_options, keepalive_options
from mosel.runtime.exposure import internal_server_tls, public_tls
from mosel.runtime.health import Health
from mosel.runtime.in_process import InProcessServer, local_services
from mosel.runtime.incoming import note_incoming
from mosel.runtime.messages import check_message, limit_bytes
from mosel.status import message_of, status_of, trailers_of
from mosel.tls import ServerTls

P = ParamSpec("P")
R = TypeVar("R")
Context = grpc.aio.ServicerContext[Any, Any]
Register = Callable[[grpc.aio.Server], None]

# After the grace, those whose calls are ended are told so.
_LAST_WORDS_S = 0.5
# After the grace, a process that is still there computes what nobody waits for, or hangs.
_HUNG_S = 1.0
# Longer deadlines, and none, count as this long.
MAX_DEADLINE_S = 3600.0

log = logging.getLogger(__name__)


class Service:
    """A gRPC server with health; a context manager that listens inside, and ends at once unless it was stopped before.

    Where its callers are in the same process, as `local_services` says, it takes their calls there and listens nowhere.

    Args:
        settings: the effective settings.
        address: `host:port` or `unix:/path`.
        setting: the setting or flag that states the address, for messages.
        register: adds the servicer.
        interceptors: what sees each call first; each costs time in every call.
        names: of the gRPC services that it adds, `mosel.v1.Gateway`, for health.
        public: whether callers from outside may call it, with `tls`; else only other services, with `internal_tls`.

    Raises:
        ConfigError: other machines could call it, and nothing protects it.
    """

    def __init__(
        self,
        settings: Settings,
        address: str,
        setting: str,
        register: Register,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        names: Sequence[str] = (),
        *,
        public: bool = False,
    ) -> None:
        self.address = address
        self._settings, self._setting, self._names = settings, setting, names
        self._in_process = not public and local_services.expects(address)
        self._stopped = False
        self._health = Health()
        self._server, self._tls = self._make_server(interceptors, public)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        register(self._server)

    def _make_server(
        self, interceptors: Sequence[grpc.aio.ServerInterceptor], public: bool
    ) -> tuple[grpc.aio.Server, ServerTls | None]:
        """The server, and what protects it."""
        settings, address = self._settings, self.address
        options = channel_options(settings)
        if self._in_process:
            return cast(grpc.aio.Server, InProcessServer(address, options, interceptors)), None
        tls = public_tls(settings) if public else internal_server_tls(settings, address, self._setting)
        if public:
            # What is under way on an old connection is finished, however long that takes.
            options.append(("grpc.max_connection_age_ms", round(settings.gateway.max_connection_age_s * 1000)))
            options += PINGS_OF_CALLERS
        else:
            options += keepalive_options(address)
        return grpc.aio.server(options=options, interceptors=interceptors), tls

    async def __aenter__(self) -> "Service":
        if not self._in_process:
            await self._listen()
        self._health.set("", True)
        self.set_ready(False)
        await self._server.start()
        log.info("listening", extra={"address": self.address, "pid": os.getpid(), "tls": self._tls is not None})
        return self

    async def __aexit__(self, *exc: object) -> None:
        if not self._stopped:
            await self.stop(Deadline.after(0))
        path = socket_path(self.address)
        if path is not None and not self._in_process:
            await asyncio.to_thread(leftovers.remove, path)
        log.info("stopped")

    async def finish(self) -> None:
        """Says that nothing is ready, goes on until nobody watches its health any more, and stops; within the grace.

        A watcher has work under way that needs this service, and leaves when that is done.
        """
        grace = Deadline.after(self._settings.stop_grace_ms / 1000)
        self.set_ready(False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(grace.remaining, 0.0)):
                await self._health.unwatched(self._names)
        await self.stop(grace)

    async def stop(self, grace: Deadline) -> None:
        """Takes no more calls, and waits for those under way; what is not over after the grace is broken off."""
        self._stopped = True
        self._health.stop()
        await self._server.stop(max(grace.remaining, 0.0) + _LAST_WORDS_S)

    async def _listen(self) -> None:
        path = socket_path(self.address)
        if path is not None:
            await asyncio.to_thread(_prepare_socket, path)
            leftovers.made(path)
        port = await self._add_port()
        if path is None:
            self.address = f"{self.address.rpartition(':')[0]}:{port}"

    async def _add_port(self) -> int:
        try:
            if self._tls is None:
                return self._server.add_insecure_port(self.address)
            credentials = await asyncio.to_thread(self._tls.server_credentials)
            return self._server.add_secure_port(self.address, credentials)
        except RuntimeError:
            raise ConfigError(f"{self._setting}: {self.address} is taken or cannot be listened on") from None

    def set_ready(self, ready: bool, *names: str) -> None:
        """Sets what `grpc.health.v1` answers for some names, or for its gRPC services; the process lives anyway."""
        for name in names or self._names:
            self._health.set(name, ready)


def socket_path(address: str) -> Path | None:
    """The path of a unix socket address, None for TCP."""
    return Path(address.removeprefix("unix:")) if address.startswith("unix:") else None


def run_service(
    name: str,
    serve: Callable[[Settings, asyncio.Event], Coroutine[Any, Any, None]],
    placement: Placement = "services",
) -> NoReturn:
    """Runs services until SIGTERM, SIGINT or SIGHUP, and ends the process; a second SIGTERM or SIGINT ends it at once.

    The exit code is 0 after a signal, 1 after a second one and after a MoselError, which is printed as one line.

    Args:
        name: for logs.
        serve: the service; it gets the effective settings and the event that a signal sets. It has the grace
            (`stop_grace_ms`) to end, and little more.
        placement: whether it is one of several in this process; the setting is what `mosel up` makes of it.
    """

    async def with_signals(settings: Settings) -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def begin() -> None:
            if not stop.is_set():
                stop.set()
                _end_after(settings.stop_grace_ms / 1000 + _HUNG_S)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: leftovers.end_process(1) if stop.is_set() else begin())
        # From the kernel when the parent is gone, once for each of its threads: no second signal.
        loop.add_signal_handler(signal.SIGHUP, begin)
        await serve(settings, stop)

    try:
        settings = load_settings(placement=placement)
        if settings.parent_pid:
            _end_with(settings.parent_pid)
        configure_logs(name, settings.log_level)
        try:
            uvloop.run(with_signals(settings))
        finally:
            # Why a process ended is the last that it says.
            flush_logs()
    except MoselError as error:
        sys.stderr.write(f"{name}: error: {error}\n")
        leftovers.end_process(1)
    leftovers.end_process(0)


def answers_with_status(
    method: Callable[P, Coroutine[Any, Any, R]],
) -> Callable[P, Coroutine[Any, Any, R]]:
    """Decorates a servicer's unary method: a MoselError becomes its status, anything else INTERNAL and a log entry."""

    @functools.wraps(method)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        context = cast(Context, args[-1])
        note_incoming(method.__name__, context.invocation_metadata)  # type: ignore[arg-type]
        try:
            return await method(*args, **kwargs)
        except MoselError as error:
            await abort_with(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except Exception:
            log.exception("unexpected error", extra={"method": method.__name__})
            await context.abort(grpc.StatusCode.INTERNAL, f"internal error in {method.__name__}; the log has more")

    return guarded


async def abort_with(context: Context, error: MoselError) -> NoReturn:
    """Ends a call with the status of an error."""
    # What grpc raises here and the call refer to each other until the garbage collector comes, which may take minutes;
    # what the error came from, such as the arena that was read, must not live as long.
    error.__traceback__ = error.__context__ = error.__cause__ = None
    await context.abort(status_of(error), message_of(error), trailers_of(error))


def deadline_of(context: Context) -> Deadline:
    """The deadline of a call as its caller set it; an hour if it set none."""
    remaining = cast(float | None, context.time_remaining())
    return Deadline.after(MAX_DEADLINE_S if remaining is None else min(remaining, MAX_DEADLINE_S))


class _InFront(grpc.aio.ServerInterceptor):
    """Puts something in front of each method's own handler, once for each: calls find it made."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[grpc.RpcMethodHandler[Any, Any], grpc.RpcMethodHandler[Any, Any]]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a method, with what is in front of it; None of a method that does not exist."""
        own = await continuation(handler_call_details)
        if own is None:
            return None
        method = handler_call_details.method
        made = self._made.get(method)
        if made is None or made[0] is not own:
            made = self._made[method] = own, self._in_front_of(own, method.rpartition("/")[2])
        return made[1]

    @abstractmethod
    def _in_front_of(self, own: Any, method: str) -> Any:
        """The handler that calls a method's own one."""


class RefuseUnread(_InFront):
    """Refuses calls of unary methods before their request is parsed; INVALID_ARGUMENT where its bytes are no message.

    grpc itself calls those UNKNOWN.

    Args:
        check: asked about each call by its method and the seconds until its deadline; raises a MoselError where that is
            enough to refuse it.
        refused: told of each that is refused.
    """

    def __init__(
        self,
        check: Callable[[str, float], None] = lambda _method, _left_s: None,
        refused: Callable[[MoselError], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._check, self._refused = check, refused

    def _in_front_of(self, own: Any, method: str) -> Any:
        if own.unary_unary is None:
            return own

        def refuse(context: Context, error: MoselError) -> None:
            note_incoming(method, context.invocation_metadata)  # type: ignore[arg-type]
            self._refused(error)
            # Unlike aborting, which raises, this costs little and leaves nothing to the garbage collector.
            context.set_code(status_of(error))
            context.set_details(message_of(error))
            context.set_trailing_metadata(trailers_of(error))

        async def parse(data: bytes, context: Context) -> Any:
            try:
                self._check(method, deadline_of(context).remaining)
                request = own.request_deserializer(data)
            except DecodeError:
                return refuse(context, InvalidRequest(f"the request's bytes are no message that {method} knows"))
            except MoselError as error:
                return refuse(context, error)
            return await own.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(parse, None, own.response_serializer)


class RefuseHugeAnswers(_InFront):
    """Answers INVALID_ARGUMENT, and names the setting, where an answer is more than a message may hold."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self._limit = limit_bytes(settings.transport.max_message_mib)

    def _in_front_of(self, own: Any, method: str) -> Any:
        if own.response_serializer is None:
            return own

        def serialize(answer: Any) -> bytes:
            data: bytes = own.response_serializer(answer)
            check_message("the answer has", len(data), self._limit)
            return data

        async def answer(request: Any, context: Context) -> Any:
            try:
                return serialize(await own.unary_unary(request, context))
            except PayloadTooLarge as error:
                await abort_with(context, error)

        if own.unary_unary is None:
            # In a stream, the one who writes gets the error.
            return own._replace(response_serializer=serialize)
        return grpc.unary_unary_rpc_method_handler(answer, own.request_deserializer, None)


def _end_after(seconds: float) -> None:
    """Ends the process if it is still there then: a thread that computes cannot be told to stop."""

    def end() -> None:
        log.warning("ended while it was busy")
        leftovers.end_process(0)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _end_with(parent_pid: int) -> None:
    """Asks Linux for SIGHUP when the process that started this one dies, however it dies.

    Raises:
        ServiceUnavailable: it is dead already.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGHUP)
    if os.getppid() != parent_pid:
        raise ServiceUnavailable(f"process {parent_pid}, which started this service, is gone")


def _prepare_socket(path: Path) -> None:
    """Makes the private folder, and removes a socket that a killed process left behind."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = path.parent.stat()
    if folder.st_uid != os.geteuid() or folder.st_mode & 0o077:
        raise ConfigError(f"run_dir: {path.parent} must belong to this user alone (mode 0700)")
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"run_dir: {path} is in use by another process; stop it or choose another run_dir")
