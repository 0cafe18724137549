"""Producer and consumer of the kill tests: what each does for ever, in the child that is killed or beside it.

A tensor's content is a function of its ref alone, so every byte that is not the ref's own is visible.
"""

import contextlib
import random
import time
from collections import Counter, deque
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mosel.errors import Overloaded, ReadNotProven
from mosel.transport import Reader, SharedMemoryArena, slice_rows
from mosel.transport.exchange import release_slots, set_slot
from mosel.transport.layout import KIB, MIB
from mosel.transport.shared_memory import SharedMemoryView
from mosel.v1 import arena_pb2, tensor_pb2

LEASE_S = 0.02
SIZES = (64 * KIB, 256 * KIB)
ACCEPTED, REFUSED, WOULD_TEAR, TORN = b"accepted", b"refused", b"would tear", b"torn"


def content(epoch: int, slot: int, generation: int, nbytes: int) -> NDArray[np.uint8]:
    """What a slot holds."""
    first = (epoch ^ (slot << 48) ^ (generation << 16)) & (2**64 - 1)
    return (np.arange(nbytes // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(first)).view(np.uint8)


class Producer:
    """Fills slots in place as fast as they come free, half by half, and sends their refs.

    Args:
        arena: whose slots.
        pipe: to the consumer; refs there, slots that are no longer read back.
    """

    def __init__(self, arena: SharedMemoryArena, pipe: Connection) -> None:
        self._arena, self._pipe = arena, pipe
        pipe.send_bytes(arena.announcement().arena.SerializeToString())

    def step(self) -> None:
        """Takes releases, then publishes one tensor if a slot is free."""
        while self._pipe.poll():
            release_slots(self._arena, [tensor_pb2.ArenaSlot.FromString(self._pipe.recv_bytes())])
        nbytes = random.choice(SIZES)
        expires_at = time.monotonic() + LEASE_S
        ref = tensor_pb2.TensorRef(dtype=tensor_pb2.UINT8, shape=[nbytes], nbytes=nbytes)
        try:
            with self._arena.filling(nbytes, expires_at, 0.001) as slot:
                data, half = content(self._arena.epoch, slot.index, slot.generation, nbytes).data, nbytes // 2
                with self._arena.writable(slot, nbytes) as target:
                    target[:half] = data[:half]
                    target[half:] = data[half:]
        except Overloaded:
            return
        set_slot(ref, self._arena, slot, expires_at)
        self._pipe.send_bytes(ref.SerializeToString())


class Consumer:
    """Reads what it is sent, some of it at once and some of it late, and releases some of it.

    Attributes:
        counts: reads by how they ended.

    Args:
        reader: with which.
        pipe: to the producer.
    """

    def __init__(self, reader: Reader, pipe: Connection) -> None:
        self.counts: Counter[bytes] = Counter()
        self._reader, self._pipe = reader, pipe
        self._late: deque[tensor_pb2.TensorRef] = deque()
        self.arena = arena_pb2.ArenaDescription.FromString(pipe.recv_bytes())
        reader.open(self.arena)

    def step(self, timeout_s: float = 0.001) -> bytes | None:
        """Reads one tensor, the newest or one whose lease may be over; returns how that ended."""
        if self._pipe.poll(timeout_s):
            self._late.append(tensor_pb2.TensorRef.FromString(self._pipe.recv_bytes()))
        if not self._late or (len(self._late) < 8 and random.random() < 0.3):
            return None
        if random.random() < 0.05:
            time.sleep(1.5 * LEASE_S)
        ref = self._late.popleft() if random.random() < 0.5 else self._late.pop()
        result = self._read(ref)
        self.counts[result] += 1
        if random.random() < 0.7:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._pipe.send_bytes(ref.slot.SerializeToString())
        return result

    def _read(self, ref: tensor_pb2.TensorRef) -> bytes:
        slot = ref.slot
        true = content(slot.epoch, slot.slot, slot.generation, ref.nbytes)
        try:
            batch = self._reader.gather([slice_rows(ref, 0, ref.nbytes)], "UINT8", ())
        except ReadNotProven:
            return REFUSED if self._unproven(slot, ref.nbytes).tobytes() == true.tobytes() else WOULD_TEAR
        return ACCEPTED if np.array_equal(batch, true) else TORN

    def _unproven(self, slot: tensor_pb2.ArenaSlot, nbytes: int) -> NDArray[np.uint8]:
        """What a reader that proves nothing would have got."""
        view = self._reader._views[slot.arena_id, slot.epoch]
        assert isinstance(view, SharedMemoryView)
        return np.frombuffer(view.map, np.uint8, nbytes, view.layout.slot_offset(slot.slot)).copy()


def produce(folder: str, pipe: Connection, seed: int) -> None:
    """A child that publishes until it is killed."""
    random.seed(seed)
    with SharedMemoryArena(Path(folder), MIB, "setting") as arena:
        producer = Producer(arena, pipe)
        while True:
            producer.step()


def consume(folder: str, pipe: Connection, results: Connection, seed: int) -> None:
    """A child that reads, and reports how each read ended, until it is killed."""
    random.seed(seed)
    with Reader(Path(folder)) as reader:
        consumer = Consumer(reader, pipe)
        while True:
            result = consumer.step()
            if result is not None:
                results.send_bytes(result)
