"""Where encoders on other hosts fetch payloads from."""

import asyncio
import contextlib
from functools import partial

from mosel.config import Settings
from mosel.errors import ServiceUnavailable
from mosel.runtime.exposure import host_of
from mosel.runtime.service import Service
from mosel.transport import SharedMemoryArena
from mosel.transport.servicer import PRODUCER, ProducerServicer
from mosel.v1 import arena_pb2_grpc


class FetchListeners:
    """Listens on those addresses of this host that lead to encoders on others, on free ports, once asked for them.

    A context manager that closes what it opened.

    Args:
        settings: the effective settings.
        arena: where payloads are; None if they never leave this process.
    """

    def __init__(self, settings: Settings, arena: SharedMemoryArena | None) -> None:
        self._settings, self._servicer = settings, ProducerServicer(arena) if arena else None
        self._listeners: dict[str, Service] = {}
        self._opening = asyncio.Lock()
        self._opened = contextlib.AsyncExitStack()

    async def address_for(self, encoder: str) -> str:
        """The address, `host:port`, at which an encoder can fetch payloads.

        Args:
            encoder: its own address.

        Raises:
            ServiceUnavailable: nothing leads there, or there is nothing to fetch.
            ConfigError: other machines could fetch payloads, and nothing protects them.
        """
        if self._servicer is None:
            raise ServiceUnavailable("service gateway keeps payloads for its own process alone")
        host = await _own_host(encoder)
        async with self._opening:
            if host not in self._listeners:
                listener = Service(
                    self._settings,
                    f"{host}:0",
                    "gateway",
                    partial(arena_pb2_grpc.add_ProducerServicer_to_server, self._servicer),
                    names=[PRODUCER],
                )
                self._listeners[host] = await self._opened.enter_async_context(listener)
                listener.set_ready(True)
        return self._listeners[host].address

    async def __aenter__(self) -> "FetchListeners":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._opened.aclose()


async def _own_host(peer: str) -> str:
    """This host's address on the way to a peer, as it is written before a port; nothing is sent."""
    port = peer.rpartition(":")[2]
    try:
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            asyncio.DatagramProtocol, remote_addr=(host_of(peer), int(port))
        )
    except (OSError, ValueError) as error:
        raise ServiceUnavailable(f"service gateway finds no way to {peer}: {error}") from None
    host: str = transport.get_extra_info("sockname")[0]
    transport.close()
    return f"[{host}]" if ":" in host else host
