"""An ASGI application on a TCP port, in the event loop of the service that it belongs to."""

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import uvicorn

from mosel.errors import ConfigError
from mosel.tls import ServerTls, handshake_refused

if TYPE_CHECKING:
    from uvicorn._types import ASGIApplication


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

    Attributes:
        port: where it listens, once it does.

    Raises:
        ConfigError: nobody can listen there, or a file of `tls` is wrong.
    """

    def __init__(
        self,
        app: "ASGIApplication",
        host: str,
        port: int,
        setting: str,
        grace_s: float,
        tls: ServerTls | None = None,
        refused: Callable[[str], None] = handshake_refused,
    ) -> None:
        self.port, self._host, self._setting = port, host, setting
        self._tls, self._refused = tls, refused
        # Loop, logs and signals are the service's.
        self._config = uvicorn.Config(
            app,
            loop="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=max(round(grace_s), 1),
        )
        self._server = uvicorn.Server(self._config)

    async def __aenter__(self) -> "HttpServer":
        context = None if self._tls is None else await asyncio.to_thread(self._tls.ssl_context, self._refused)
        listener = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self._host, self.port))
        except OSError as error:
            listener.close()
            where = f"{self._host}:{self.port}"
            raise ConfigError(f"{self._setting}: cannot listen on {where}: {error.strerror}") from None
        self.port = listener.getsockname()[1]
        self._listener = listener
        # As `uvicorn.Server.serve` does, without its signal handlers.
        self._config.load()
        self._config.ssl = context
        self._server.lifespan = self._config.lifespan_class(self._config)
        await self._server.startup([listener])
        self._task = asyncio.create_task(self._server.main_loop(), name=f"http on {self.port}")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.should_exit = True
        await self._task
        await self._server.shutdown([self._listener])
