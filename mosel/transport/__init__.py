"""Tensor transport: how a tensor gets from one process to another.

A producer *publishes* a tensor and gets a tensor ref, a small message. Whoever holds the ref *gathers* rows of it.
Small tensors travel inside the ref; larger ones stay in a slot of the producer's arena in POSIX shared memory.

    layout         where the slots of an arena are; both sides compute it, so no offset travels
    slots          which slots are free, being filled or published; plain Python, time is an argument
    shared_memory  the arena as a file in /dev/shm: created by the producer, mapped read-only by consumers
    exchange       Publisher and Reader: tensors in, refs out, and back
"""

from mosel.transport.exchange import Publisher, Reader, open_arena, slice_rows
from mosel.transport.shared_memory import Arena

__all__ = ["Arena", "Publisher", "Reader", "open_arena", "slice_rows"]
