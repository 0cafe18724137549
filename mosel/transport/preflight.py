"""A consumer's answer to `OpenArena`: what it read through the path, or why it could not."""

from typing import Protocol

from mosel.errors import MoselError
from mosel.v1 import arena_pb2


class Opens(Protocol):
    """A reader that can open arenas."""

    def open(self, arena: arena_pb2.ArenaDescription) -> bytes:
        """Opens an arena and reads its nonce; raises MoselError with the reason if the path does not work."""
        ...


def preflight(reader: Opens, request: arena_pb2.OpenArenaRequest) -> arena_pb2.PreflightReport:
    """Opens the arena and reports; blocks, and takes milliseconds for device memory."""
    try:
        return arena_pb2.PreflightReport(nonce=reader.open(request.arena))
    except MoselError as error:
        return arena_pb2.PreflightReport(reason=str(error))
