"""What the tests of the transport share."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mosel.config import TransportSettings
from mosel.tensors import DTYPES
from mosel.transport import Publisher, SharedMemoryArena
from mosel.transport.object_arena import ObjectArena
from mosel.transport.slots import Slot
from mosel.v1 import tensor_pb2

SETTING = "transport.gateway_arena_mib"
ITEM = (3, 5)
# A test whose `arena` is of this type runs over each of them.
AnyArena = SharedMemoryArena | ObjectArena

Change = Callable[[tensor_pb2.RowSlice], None]


def write(arena: AnyArena, data: bytes, lease_s: float = 60.0, wait_s: float = 0.0) -> Slot:
    return arena.write(memoryview(data), time.monotonic() + lease_s, wait_s)


def publisher(arena: AnyArena, place: str = "slot") -> Publisher:
    """One whose tensors all go to the same kind of place, inline or into a slot."""
    made = publisher_with(arena, inline_max_kib=0, inline_when_full_max_kib=0)
    made.rung = tensor_pb2.INLINE if place == "inline" else arena.rung
    return made


def publisher_with(arena: AnyArena, **limits: int) -> Publisher:
    transport = TransportSettings.model_validate(limits)
    if isinstance(arena, ObjectArena):
        return Publisher(None, transport, arena)
    return Publisher(arena, transport)


def tensor(dtype: str, rows: int, item: tuple[int, ...] = ITEM) -> NDArray[np.generic]:
    noise = np.random.default_rng(rows).integers(0, 2 if dtype == "BOOL" else 100, (rows, *item))
    return noise.astype(DTYPES[dtype])


def publish(
    publisher: Publisher, dtype: str, array: NDArray[np.generic], lease_s: float = 60.0
) -> tensor_pb2.TensorRef:
    return publisher.publish(dtype, array.shape, memoryview(array.tobytes()), lease_s)


def field(path: str, value: int | bytes) -> Change:
    """Sets one field of a slice."""

    def change(part: tensor_pb2.RowSlice) -> None:
        *parents, name = path.split(".")
        message = part
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, name, value)

    return change


def shape(*dimensions: int) -> Change:
    return lambda part: part.ref.shape.__setitem__(slice(None), dimensions)
