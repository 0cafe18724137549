"""Mutated refs: whatever a ref says, what is read is what was published under exactly that ref, or nothing.

An oracle of its own decides what a mutated ref still means: a ref that means nothing must be refused, one that still
means a tensor must bring exactly its bytes. The slots around the tensors are full of a canary.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from mosel.errors import InvalidRequest, ReadNotProven
from mosel.transport import Reader, SharedMemoryArena, slice_rows
from mosel.transport.layout import KIB, MIB
from mosel.v1 import tensor_pb2
from tests.mosel.transport.support import ITEM, SETTING, publish, publisher, write

MUTANTS = 100_000
ROW_BYTES = 4 * 3 * 5
CANARY = b"\xc5"
U32 = (0, 1, 2, 3, 7, 8, 9, 2**16, 2**31 - 1, 2**31, 2**32 - 1)
U64 = (*U32, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1)
DIMENSIONS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 15, 2**16, 2**31, 2**40, 2**59, 2**62, 2**63 - 1)
# Forged leases are far away, so that the oracle and the reader cannot disagree about the time.
LEASES = (0, 1, 5_000_000, 2**32)

Published = dict[tuple[int, int, int, int], tuple[tensor_pb2.TensorRef, bytes]]
Mutation = Callable[[random.Random, tensor_pb2.RowSlice], tensor_pb2.RowSlice | None]


def key(slot: tensor_pb2.ArenaSlot) -> tuple[int, int, int, int]:
    return slot.arena_id, slot.epoch, slot.slot, slot.generation


def number(rng: random.Random, old: int, special: tuple[int, ...], bits: int) -> int:
    """A special number, a neighbour of the old one, one with a bit flipped, or any."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(special)
    if kind == 1:
        return (old + rng.choice((-2, -1, 1, 2))) % (1 << bits)
    return old ^ (1 << rng.randrange(bits)) if kind == 2 else rng.getrandbits(bits)


def place(rng: random.Random, part: tensor_pb2.RowSlice) -> None:
    slot, name = part.ref.slot, rng.choice(("arena_id", "epoch", "slot", "generation", "lease_expires_ns"))
    if name == "lease_expires_ns":
        slot.lease_expires_ns = rng.choice(LEASES)
    elif name == "slot":
        slot.slot = number(rng, slot.slot, U32, 32)
    else:
        setattr(slot, name, number(rng, getattr(slot, name), U64, 64))


def rows(rng: random.Random, part: tensor_pb2.RowSlice) -> None:
    part.row_start = number(rng, part.row_start, U32, 32)
    if rng.random() < 0.5:
        part.row_count = number(rng, part.row_count, U32, 32)


def shape(rng: random.Random, part: tensor_pb2.RowSlice) -> None:
    dimensions, kind = list(part.ref.shape), rng.randrange(4)
    if kind == 0 or not dimensions:
        dimensions = [rng.choice(DIMENSIONS) for _ in range(rng.randrange(5))]
    elif kind == 1:
        dimensions *= rng.choice((2, 50))  # a huge rank
    else:
        dimensions[rng.randrange(len(dimensions)) if kind == 2 else 0] = rng.choice(DIMENSIONS)
    part.ref.shape[:] = dimensions


def consistent(rng: random.Random, part: tensor_pb2.RowSlice) -> None:
    """More rows or fewer, everything else in agreement: only the arena can know that it is wrong."""
    count = rng.choice((0, 1, 2, 40, 63 * KIB // ROW_BYTES, 256 * KIB // ROW_BYTES, MIB, 2**57, 2**62 // ROW_BYTES))
    part.ref.shape[:] = [count, *ITEM]
    part.ref.nbytes = count * ROW_BYTES
    part.row_start, part.row_count = 0, min(count, 2**32 - 1)


def nbytes(rng: random.Random, part: tensor_pb2.RowSlice) -> None:
    part.ref.nbytes = number(rng, part.ref.nbytes, U64, 64)


def dtype(rng: random.Random, part: tensor_pb2.RowSlice) -> None:
    part.ref.dtype = rng.randrange(-2, 14)  # type: ignore[assignment]
    if rng.random() < 0.2:
        part.ref.dtype = rng.choice((2**31 - 1, -(2**31)))  # type: ignore[assignment]


def elsewhere(rng: random.Random, part: tensor_pb2.RowSlice) -> None:
    if rng.random() < 0.1:
        part.ref.ClearField("slot")
    else:
        part.ref.inline = bytes(rng.choice((0, 1, ROW_BYTES, part.ref.nbytes % 10_000, part.ref.nbytes % 10_000 + 1)))


FIELDS = (place, place, rows, shape, consistent, nbytes, dtype, elsewhere)


def fields(rng: random.Random, part: tensor_pb2.RowSlice) -> tensor_pb2.RowSlice:
    for mutate in rng.choices(FIELDS, k=rng.choice((1, 1, 1, 2, 3))):
        mutate(rng, part)
    return part


def flips(rng: random.Random, part: tensor_pb2.RowSlice) -> tensor_pb2.RowSlice | None:
    """Bytes of the message itself changed, cut off or inserted; None if it is no message any more."""
    data = bytearray(part.SerializeToString())
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = rng.randbytes(1)
        else:
            data[at] = rng.randrange(256) if kind == 2 else data[at] ^ (1 << rng.randrange(8))
        if not data:
            break
    try:
        return tensor_pb2.RowSlice.FromString(bytes(data))
    except DecodeError:
        return None


def meaning(published: Published, part: tensor_pb2.RowSlice) -> bytes | None:
    """The bytes that a ref means, None if it means none; knows nothing of how readers check."""
    ref, begin, end = part.ref, part.row_start * ROW_BYTES, (part.row_start + part.row_count) * ROW_BYTES
    if ref.HasField("slot"):
        original, data = published.get(key(ref.slot), (None, b""))
        if original is None or ref.slot.lease_expires_ns < time.monotonic_ns() + 10**9:
            return None
        if (ref.dtype, ref.shape, ref.nbytes) != (original.dtype, original.shape, original.nbytes):
            return None
    else:
        data = ref.inline
        sound = ref.dtype == tensor_pb2.FP32 and list(ref.shape) == [len(data) // ROW_BYTES, *ITEM]
        if not ref.HasField("inline") or not sound or ref.nbytes != len(data) or len(data) % ROW_BYTES:
            return None
    return data[begin:end] if end <= len(data) else None


def canary_arena(shm: Path) -> tuple[SharedMemoryArena, Published]:
    """An arena with three tensors; every other byte of every slot is a canary."""
    arena, published = SharedMemoryArena(shm, MIB, SETTING), Published()
    slots = [write(arena, CANARY * arena.layout.slot_size(i), 1e6) for i in range(arena.layout.slot_count)]
    rng = np.random.default_rng(1)
    for index, count in ((1, 40), (4, 63 * KIB // ROW_BYTES), (6, 256 * KIB // ROW_BYTES)):
        arena.release(index, slots[index].generation)
        array = rng.random((count, *ITEM), np.float32)
        ref = publish(publisher(arena), "FP32", array, lease_s=1e6)
        assert ref.slot.slot == index
        published[key(ref.slot)] = ref, array.tobytes()
    return arena, published


@pytest.mark.parametrize(("seed", "mutate"), [(1, fields), (2, flips)])
def test_every_mutated_ref_brings_what_it_means_or_is_refused(shm: Path, seed: int, mutate: Mutation) -> None:
    rng = random.Random(seed)
    arena, published = canary_arena(shm)
    foreign, others = canary_arena(shm)
    parts = [slice_rows(ref, 0, ref.shape[0]) for ref, _ in published.values()]
    strangers = [slice_rows(ref, 0, ref.shape[0]) for ref, _ in others.values()]
    outcomes: Counter[str] = Counter()
    with arena, foreign, Reader(shm) as reader:
        reader.open(arena.announcement().arena)
        while outcomes["refused"] < MUTANTS:
            part = tensor_pb2.RowSlice()
            part.CopyFrom(rng.choice(strangers if rng.random() < 0.02 else parts))
            mutant = mutate(rng, part)
            if mutant is None:
                outcomes["no message"] += 1
                continue
            outcomes[check(reader, mutant, meaning(published, mutant))] += 1
        assert check(reader, strangers[0], None) == "refused", "an arena that was not opened"
        for part in parts:
            assert check(reader, part, published[key(part.ref.slot)][1]) == "read"
    print(dict(outcomes))  # noqa: T201
    assert outcomes["refused"] == MUTANTS
    assert outcomes["read"] > 0, "some mutants still mean something: other rows, another lease"
    assert outcomes.total() == outcomes["refused"] + outcomes["read"] + outcomes["no message"]


def check(reader: Reader, part: tensor_pb2.RowSlice, expected: bytes | None) -> str:
    """Reads, and fails unless that brings exactly the bytes that are expected, or a refusal if none are."""
    try:
        batch = reader.gather([part], "FP32", ITEM).tobytes()
    except (InvalidRequest, ReadNotProven):
        batch = None
    assert batch == expected, part
    return "refused" if batch is None else "read"
