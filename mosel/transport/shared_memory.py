"""Arenas whose slots are in POSIX shared memory, in the control file itself."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mosel.errors import InvalidRequest, ReadNotProven
from mosel.transport.arena import ControlledArena
from mosel.transport.control import ControlView
from mosel.transport.layout import KIB
from mosel.transport.slots import Slot
from mosel.v1 import arena_pb2, tensor_pb2

# So much is copied at once for those who fetch: it fits into any message, and holds up nobody.
PIECE_BYTES = 512 * KIB


class SharedMemoryArena(ControlledArena):
    """The producer's side; see `Arena`."""

    rung = tensor_pb2.POSIX_SHM

    def __init__(self, directory: Path, nbytes: int, setting: str) -> None:
        super().__init__(directory, nbytes, True, setting)

    def write(self, data: memoryview, expires_at: float, wait_s: float = 0.0) -> Slot:
        """Copies contiguous bytes into a slot and publishes it.

        Args:
            data: the bytes.
            expires_at: end of the lease, seconds on the monotonic clock.
            wait_s: seconds to wait for a slot at most.

        Raises:
            PayloadTooLarge: no slot of this arena is that large.
            Overloaded: every slot that fits is in use.
        """
        with self.filling(data.nbytes, expires_at, wait_s) as slot:
            self.writable(slot, data.nbytes)[:] = data.cast("B")
        return slot

    def writable(self, slot: Slot, nbytes: int) -> memoryview:
        """The first `nbytes` bytes of a slot, to be written in place while it is being filled.

        To be released (`with`) before the slot is published.
        """
        return memoryview(self._control.map)[slot.offset : slot.offset + nbytes]

    def pieces(self, wanted: arena_pb2.SlotRange) -> Iterator[bytes]:
        """The bytes of a range in pieces of at most `PIECE_BYTES`, each copied and then proven.

        Args:
            wanted: from a consumer that cannot map the arena.

        Raises:
            InvalidRequest: the range is not one of the tensor.
            ReadNotProven: the slot does not hold that tensor (any more).
        """
        if not wanted.begin <= wanted.end <= wanted.nbytes:
            raise InvalidRequest(f"range {wanted.begin}..{wanted.end} of a tensor of {wanted.nbytes} bytes")
        slot = self.check_published(wanted.slot, wanted.generation)
        if self._control.size_of(slot.index) != wanted.nbytes:
            raise ReadNotProven("the slot holds a tensor of another size: the ref is wrong")
        for begin in range(wanted.begin, wanted.end, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, wanted.end)
            piece = self._control.map[slot.offset + begin : slot.offset + end]
            self.check_published(wanted.slot, wanted.generation)
            yield piece

    def _describe(self, arena: arena_pb2.ArenaDescription) -> None:
        """Nothing to add: the name of the file follows from the arena's numbers."""


class SharedMemoryView(ControlView):
    """The consumer's side: a read-only map of somebody else's arena.

    Raises:
        ReadNotProven: the file is not there, or is not the arena that was named.
    """

    def __init__(self, directory: Path, arena_id: int, epoch: int) -> None:
        super().__init__(directory, arena_id, epoch)
        if not self.holds_slots:
            self.close()
            raise ReadNotProven("the arena's slots are not in shared memory")

    def bytes_of(self, slot: int, nbytes: int) -> NDArray[np.uint8]:
        """The first `nbytes` bytes of a slot, not copied; call `prove` after copying them."""
        self.check_bounds(slot, nbytes)
        return np.frombuffer(self.map, np.uint8, nbytes, self.layout.slot_offset(slot))
