"""Tensor transport: how a tensor gets from one process to another.

A producer *publishes* a tensor and gets a tensor ref, a small message. Who holds the ref *gathers* rows of it.
Small tensors travel inside the ref; larger ones stay in a slot of one of the producer's arenas, in POSIX shared memory,
in device memory, or as they are where both share a process, until the selector releases the slot or its lease is over.

    layout          where the slots of an arena are; both sides compute it, so no offset travels
    slots           which slots are free, being filled or published; plain Python, time is an argument
    control         the control file: header, nonce, generations; and the proof of a read
    arena           slots + leases, whatever memory the bytes are in; with a control file where others open it
    object_arena    arenas of objects, for consumers in the same process
    shared_memory   arenas in POSIX shared memory
    device_arena    arenas in device memory, through CUDA IPC; device_ipc: what they need of a GPU runtime
    refs            refs from a peer, checked
    fetched         arenas that cannot be mapped: their producers are asked for rows
    servicer        the other side of that
    opening         opens the arenas that a producer needs
    exchange        Publisher and Reader, for tensors in host memory
    torch_exchange  the same for torch tensors, wherever they are; imports torch
    host            who shares a host, namespaces, and a clock
"""

from mosel.transport.exchange import Publisher, Reader
from mosel.transport.opening import SHARED, ArenaKinds, open_arenas
from mosel.transport.refs import slice_rows
from mosel.transport.shared_memory import SharedMemoryArena

__all__ = ["SHARED", "ArenaKinds", "Publisher", "Reader", "SharedMemoryArena", "open_arenas", "slice_rows"]
