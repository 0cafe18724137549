"""Arenas of objects, for producers and consumers that share a process: a slot holds the tensor itself.

Nothing is copied and nothing is in /dev/shm. From `write` or `keep` on, neither side writes to the bytes any more. The
arena lets go of them when their slot is freed; who reads them then keeps them alive, so no read is ever torn. Slots,
leases and what a ref means are those of every arena.
"""

import os
import secrets
import weakref

import numpy as np
from numpy.typing import NDArray

from mosel.errors import ReadNotProven
from mosel.transport.arena import Arena
from mosel.transport.control import NONCE_BYTES, check_lease
from mosel.transport.slots import Content, Slot
from mosel.v1 import arena_pb2, tensor_pb2


class ObjectArena(Arena):
    """The producer's side; see `Arena`. Consumers of this process find it while it is open.

    Args:
        nbytes: the budget in bytes: what its objects may have, in slots of the usual sizes.
        setting: the setting that states the budget, for messages.
    """

    rung = tensor_pb2.IN_PROCESS

    def __init__(self, nbytes: int, setting: str) -> None:
        super().__init__(nbytes, setting)
        self.arena_id, self.epoch = secrets.randbits(64), secrets.randbits(64)
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        _open[self.arena_id, self.epoch] = self

    @property
    def is_closed(self) -> bool:
        """Whether its objects were given back."""
        return (self.arena_id, self.epoch) not in _open

    def write(self, data: memoryview, expires_at: float, wait_s: float = 0.0) -> Slot:
        """Publishes contiguous bytes in host memory, which stay where they are; errors as of `keep`."""
        content = np.frombuffer(data, np.uint8)
        content.flags.writeable = False
        return self.keep(content, expires_at, wait_s)

    def keep(self, content: Content, expires_at: float, wait_s: float = 0.0) -> Slot:
        """Publishes the bytes of a tensor where they are.

        Args:
            content: uint8 [nbytes], of numpy or of torch on any device.
            expires_at: end of the lease, seconds on the monotonic clock.
            wait_s: seconds to wait for a slot at most.

        Raises:
            PayloadTooLarge: no slot of this arena is that large.
            Overloaded: every slot that fits is in use.
        """
        with self.filling(content.nbytes, expires_at, wait_s) as slot:
            slot.content = content
        return slot

    def content_of(self, index: int) -> Content | None:
        """What is in a slot now, None if nothing is; whether that is what a ref means, `check_published` says."""
        return self._table.slots[index].content if 0 <= index < self.layout.slot_count else None

    def close(self) -> None:
        """Lets go of all objects; consumers open it no more, and what they ask for is not proven."""
        _open.pop((self.arena_id, self.epoch), None)
        with self._lock:
            for slot in self._table.slots:
                slot.content = None

    def _describe(self, arena: arena_pb2.ArenaDescription) -> None:
        """Nothing to add: the arena's numbers find it."""

    def _claim(self, slot: Slot, nbytes: int) -> None:
        """Nothing to tell: readers ask the arena itself."""


class ObjectView:
    """The consumer's side: an arena of the same process.

    Attributes:
        nonce: the arena's.

    Raises:
        ReadNotProven: there is no such arena in this process.
    """

    def __init__(self, arena_id: int, epoch: int) -> None:
        arena = _open.get((arena_id, epoch))
        if arena is None:
            raise ReadNotProven("the arena is not in this process")
        self._arena, self.nonce = arena, arena.nonce

    def is_gone(self) -> bool:
        """Whether the producer has closed the arena."""
        return self._arena.is_closed

    def content_of(self, slot: int, nbytes: int) -> Content:
        """The bytes of the tensor in a slot, not copied and not to be written to; call `prove` after taking them.

        Raises:
            ReadNotProven: the slot is empty, or holds a tensor of another size.
        """
        content = self._arena.content_of(slot)
        if content is None or content.nbytes != nbytes:
            raise ReadNotProven(
                "the slot holds no such tensor: the ref is wrong, the slot was reused, or its lease is over"
            )
        return content

    def bytes_of(self, slot: int, nbytes: int) -> NDArray[np.uint8]:
        """As `content_of`, of a tensor that numpy can see, read-only.

        Raises:
            ReadNotProven: it is not in host memory, or as of `content_of`.
        """
        content = self.content_of(slot, nbytes)
        if not isinstance(content, np.ndarray):
            raise ReadNotProven("the tensor is an object of torch, which this consumer does not read")
        return content

    def taken(self, slot: tensor_pb2.ArenaSlot, nbytes: int) -> Content:
        """As `content_of`, proven: an object does not change, so what is proven now stays so."""
        content = self.content_of(slot.slot, nbytes)
        self.prove(slot.slot, slot.generation, slot.lease_expires_ns)
        return content

    def prove(self, slot: int, generation: int, lease_expires_ns: int) -> None:
        """Checks that what was taken from a slot is what the ref means: the producer itself says so.

        A slot's generations only rise: if the one that the ref names is published now, the object that was taken before
        is that one's.

        Raises:
            ReadNotProven: there is no such lease (any more).
        """
        self._arena.check_published(slot, generation)
        check_lease(lease_expires_ns)

    def close(self) -> None:
        """Nothing to give back."""


# Those that are open, by id and epoch; one that nobody has any more is none.
_open: weakref.WeakValueDictionary[tuple[int, int], ObjectArena] = weakref.WeakValueDictionary()
# A fork copies the arenas, but what is published later stays with the parent.
os.register_at_fork(after_in_child=_open.clear)
