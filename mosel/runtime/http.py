"""An ASGI application on a TCP port, in the event loop of the service that it belongs to."""

import asyncio
import contextlib
import logging
import math
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mosel.config import HTTP_IDLE_S
from mosel.errors import ConfigError
from mosel.tls import ServerTls, handshake_refused

if TYPE_CHECKING:
    from starlette.types import ASGIApp


class _Connection(H11Protocol):
    """Ends when no whole request has come for so long, whatever dribbles in; uvicorn waits as long as it does."""

    def __init__(self, idle_s: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._idle_s = idle_s
        self._idle: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """The caller is there, and has sent nothing."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Something of a request, or all of it."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The next request may come."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller is gone."""
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        # Before the first request there is none, whatever uvicorn's types say.
        if self.cycle is not None and not self.cycle.response_complete:  # type: ignore[redundant-expr]
            self._stop_watching()
        elif self._idle is None and not self.transport.is_closing():
            self._idle = self.loop.call_later(self._idle_s, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None


class _Server(uvicorn.Server):
    """Leaves signals to the service that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


class HttpServer:
    """Listens inside the block, and finishes what was begun at its end.

    Args:
        app: the application.
        host: to listen on.
        port: 0 takes a free one.
        setting: the flag that states the port, for messages.
        grace_s: how long calls may take to finish at the end.
        tls: how the port shows who it is; None: in plain text.
        refused: called with the reason when TLS does not let a caller in.
        idle_s: how long a connection may bring no whole request.

    Attributes:
        port: where it listens, once it does.

    Raises:
        ConfigError: nobody can listen there, or a file of `tls` is wrong.
    """

    def __init__(
        self,
        app: "ASGIApp",
        host: str,
        port: int,
        setting: str,
        grace_s: float,
        tls: ServerTls | None = None,
        refused: Callable[[str], None] = handshake_refused,
        idle_s: float = HTTP_IDLE_S,
    ) -> None:
        self.port, self._host, self._setting = port, host, setting
        self._tls, self._refused = tls, refused
        # Loop and logs are the service's.
        self._config = uvicorn.Config(
            app,
            http=partial(_Connection, idle_s),  # type: ignore[arg-type] # it is called, and no more
            loop="none",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=math.ceil(idle_s),
            # A little longer: those whose jobs are ended then are told so.
            timeout_graceful_shutdown=math.ceil(grace_s) + 1,
        )
        self._server = _Server(self._config)

    async def __aenter__(self) -> "HttpServer":
        context = None if self._tls is None else await asyncio.to_thread(self._tls.ssl_context, self._refused)
        listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._host, self.port))
            listener.listen()
        except OSError as error:
            listener.close()
            where = f"{self._host}:{self.port}"
            raise ConfigError(f"{self._setting}: cannot listen on {where}: {error.strerror}") from None
        self.port = listener.getsockname()[1]
        self._config.load()
        self._config.ssl = context
        # The socket listens already: callers who come before uvicorn is there wait in its backlog.
        self._task = asyncio.create_task(self._server.serve([listener]), name=f"http on {self.port}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop()
        await self._task

    def stop(self) -> None:
        """Takes no more calls from now on; the end of the block waits for those that were begun."""
        self._server.should_exit = True
