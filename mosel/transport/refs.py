"""Tensor refs from a peer: every field is checked as a plain integer before anything is computed from it."""

from dataclasses import dataclass

from mosel.errors import InvalidRequest
from mosel.tensors import byte_count, checked_shape, dtype_name
from mosel.transport.layout import SLOT_SIZES
from mosel.v1 import tensor_pb2


@dataclass(frozen=True, slots=True)
class CheckedSlice:
    """Rows of a tensor whose ref is known to be sound in itself.

    Attributes:
        inline: the tensor's bytes, or None if they are in a slot.
        slot: where they are otherwise.
        nbytes: bytes of the whole tensor.
        begin: first byte of the rows.
        end: the byte after them.
        rows: how many.
    """

    inline: bytes | None
    slot: tensor_pb2.ArenaSlot
    nbytes: int
    begin: int
    end: int
    rows: int


def checked_slice(part: tensor_pb2.RowSlice, dtype: str, item_shape: tuple[int, ...]) -> CheckedSlice:
    """Checks a slice from a peer.

    Args:
        part: the slice.
        dtype: the data type that its tensor must have.
        item_shape: the shape that every row must have.

    Raises:
        InvalidRequest: its fields contradict each other or what is expected.
    """
    # Each field once: to read one from a message takes longer than to check it.
    ref, start, rows = part.ref, part.row_start, part.row_count
    name, nbytes = dtype_name(ref.dtype), ref.nbytes
    shape = checked_shape(tuple(ref.shape), "ref.shape")
    if name != dtype or shape[1:] != item_shape or not shape:
        raise InvalidRequest(f"ref is {name} {list(shape)}; expected {dtype} [rows, {', '.join(map(str, item_shape))}]")
    row_bytes = byte_count(name, item_shape)
    if nbytes != shape[0] * row_bytes:
        raise InvalidRequest(f"ref.nbytes is {nbytes}; {name} {list(shape)} has {byte_count(name, shape)}")
    if start + rows > shape[0]:
        raise InvalidRequest(f"rows {start}..+{rows} of a tensor with {shape[0]} rows")
    place = ref.WhichOneof("place")
    inline = ref.inline if place == "inline" else None
    if place is None:
        raise InvalidRequest("ref says no place; expected inline bytes or a slot")
    if inline is not None and len(inline) != nbytes:
        raise InvalidRequest(f"ref.inline has {len(inline)} bytes; expected {nbytes}")
    if inline is None and nbytes > SLOT_SIZES[-1]:
        raise InvalidRequest(f"ref.nbytes is {nbytes}; the largest slot has {SLOT_SIZES[-1]}")
    return CheckedSlice(inline, ref.slot, nbytes, start * row_bytes, (start + rows) * row_bytes, rows)


def slice_rows(ref: tensor_pb2.TensorRef, start: int, count: int) -> tensor_pb2.RowSlice:
    """Rows [start, start + count) of a tensor, for the wire. Of an inline tensor only those rows travel on."""
    if ref.WhichOneof("place") != "inline" or (start == 0 and count == ref.shape[0]):
        return tensor_pb2.RowSlice(ref=ref, row_start=start, row_count=count)
    row_bytes = len(ref.inline) // max(ref.shape[0], 1)
    rows = ref.inline[start * row_bytes : (start + count) * row_bytes]
    part = tensor_pb2.TensorRef(dtype=ref.dtype, shape=[count, *ref.shape[1:]], nbytes=len(rows), inline=rows)
    return tensor_pb2.RowSlice(ref=part, row_start=0, row_count=count)
