"""The consumer's side of fetching: somebody else's arena that cannot be mapped here."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray

from mosel.deadline import Deadline
from mosel.errors import ReadNotProven, ServiceUnavailable
from mosel.status import error_from_rpc
from mosel.transport.refs import CheckedSlice
from mosel.v1 import arena_pb2, arena_pb2_grpc

# Makes a channel to an address, for calls that block.
Connect = Callable[[str], grpc.Channel]
# A slice, and where its bytes are to be put.
Wanted: TypeAlias = tuple[CheckedSlice, NDArray[np.uint8]]

_CLOSED = "the arena was closed while it was read"


class FetchedArena:
    """An arena whose producer serves it by `Fetch`, and proves what it sends itself. Thread-safe; calls block.

    Args:
        arena: as the selector describes it; `address` says where its producer is.
        connect: makes a channel.

    Raises:
        ConfigError: there may be no channel to that address.
    """

    def __init__(self, arena: arena_pb2.ArenaDescription, connect: Connect) -> None:
        self.address = arena.address
        self._arena_id, self._epoch = arena.arena_id, arena.epoch
        self._channel = connect(arena.address)
        self._stub = arena_pb2_grpc.ProducerStub(self._channel)

    def nonce(self, deadline: Deadline) -> bytes:
        """The arena's nonce, through the path that tensors will take; errors as of `fetch`."""
        return b"".join(self._pieces([], deadline))

    def fetch(self, wanted: Sequence[Wanted], deadline: Deadline) -> None:
        """Fetches slices, all in one call.

        Raises:
            ReadNotProven: a slot was reused or its lease was over, the arena was closed, or its producer is away.
            DeadlineExceeded: the deadline passed.
        """
        ranges = [
            arena_pb2.SlotRange(
                slot=part.slot.slot,
                generation=part.slot.generation,
                nbytes=part.nbytes,
                begin=part.begin,
                end=part.end,
            )
            for part, _ in wanted
        ]
        _fill((target for _, target in wanted), self._pieces(ranges, deadline))

    def close(self) -> None:
        """Ends calls under way, and the connection."""
        self._channel.close()

    def _pieces(self, ranges: Sequence[arena_pb2.SlotRange], deadline: Deadline) -> Iterator[bytes]:
        deadline.check("fetching")
        request = arena_pb2.FetchRequest(arena_id=self._arena_id, epoch=self._epoch, ranges=ranges)
        try:
            call = self._stub.Fetch(request, timeout=deadline.remaining)
        except ValueError:
            raise ReadNotProven(_CLOSED) from None
        try:
            for reply in call:
                yield reply.data
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.CANCELLED:
                raise ReadNotProven(_CLOSED) from None
            found = error_from_rpc(error, "that holds the tensor")
            # This process is there: its caller must not take it for the one that is away.
            raise (ReadNotProven(str(found)) if isinstance(found, ServiceUnavailable) else found) from None
        finally:
            call.cancel()


def _fill(targets: Iterable[NDArray[np.uint8]], pieces: Iterator[bytes]) -> None:
    """Puts bytes that come in pieces of any size into targets, one after the other."""
    piece = np.empty(0, np.uint8)
    for target in targets:
        done = 0
        while done < len(target):
            if not len(piece):
                piece = np.frombuffer(_next(pieces), np.uint8)
            part = piece[: len(target) - done]
            target[done : done + len(part)] = part
            piece, done = piece[len(part) :], done + len(part)
    # Also hears how the call ended: an error may come after the last byte.
    if len(piece) or next(pieces, None) is not None:
        raise ReadNotProven("the producer sent more bytes than were asked for")


def _next(pieces: Iterator[bytes]) -> bytes:
    # An empty piece would be no progress.
    if piece := next(pieces, b""):
        return piece
    raise ReadNotProven("the producer sent fewer bytes than were asked for")
