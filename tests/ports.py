"""Ports for services that must be told where to listen."""

import contextlib
import random
import socket

# Below those that Linux gives to connections: none of these can take one before its service listens.
_PORTS = range(20_000, 32_768)


def free_ports(count: int) -> list[int]:
    """So many ports of this machine on which nobody listens."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.choice(_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            if port not in ports:
                ports.append(port)
    return ports
