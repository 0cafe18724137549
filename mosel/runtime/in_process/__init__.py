"""Calls between services of one process: messages are handed over as they are, and all else is as on the wire."""

from mosel.runtime.in_process.channel import InProcessChannel
from mosel.runtime.in_process.local_services import LocalServices, local_services
from mosel.runtime.in_process.server import InProcessServer

__all__ = ["InProcessChannel", "InProcessServer", "LocalServices", "local_services"]
