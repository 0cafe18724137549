"""Refs from a peer: what is wrong in one is named, and nothing is read."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mosel.errors import InvalidRequest, MoselError, ReadNotProven
from mosel.transport import Reader, slice_rows
from mosel.v1 import tensor_pb2
from tests.mosel.transport.support import ITEM, AnyArena, Change, field, publish, publisher, shape, tensor


def no_place(part: tensor_pb2.RowSlice) -> None:
    part.ref.ClearField("inline")
    part.ref.ClearField("slot")


def huge(part: tensor_pb2.RowSlice) -> None:
    shape(2**31, *ITEM)(part)
    part.ref.nbytes = 2**31 * 60
    part.row_count = 2**31


MALFORMED = {
    "dtype unknown": (field("ref.dtype", 77), "dtype 77 is unknown"),
    "dtype unspecified": (field("ref.dtype", 0), "dtype 0 is unknown"),
    "another dtype": (field("ref.dtype", tensor_pb2.INT32), "expected FP32"),
    "no shape": (shape(), r"expected FP32 \[rows, 3, 5\]"),
    "another item shape": (shape(4, 5, 3), r"expected FP32 \[rows, 3, 5\]"),
    "another rank": (shape(4, 15), r"expected FP32 \[rows, 3, 5\]"),
    "rank 9": (shape(*[1] * 9), "rank 9"),
    "negative rows": (shape(-4, 3, 5), "at least 0"),
    "more rows than bytes": (shape(5, 3, 5), "ref.nbytes is 240"),
    "product overflows": (shape(2**62, 3, 5), "larger than any memory"),
    "nbytes": (field("ref.nbytes", 241), "ref.nbytes is 241"),
    "no place": (no_place, "no place"),
    "rows beyond the end": (field("row_start", 3), "rows 3"),
    "count beyond the end": (field("row_count", 2**32 - 1), "of a tensor with 4 rows"),
}
INLINE_ONLY = {
    "fewer inline bytes": (field("ref.inline", bytes(239)), "ref.inline has 239 bytes"),
    "no inline bytes": (field("ref.inline", b""), "ref.inline has 0 bytes"),
    "larger than memory": (huge, "ref.inline has 240 bytes"),
}
SLOT_ONLY = {
    "larger than memory": (huge, "the largest slot has"),
}


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [pytest.param("slot", *case, id=f"slot: {name}") for name, case in (MALFORMED | SLOT_ONLY).items()]
    + [pytest.param("inline", *case, id=f"inline: {name}") for name, case in (MALFORMED | INLINE_ONLY).items()],
)
def test_a_malformed_slice_is_refused_by_name(
    arena: AnyArena, reader: Reader, place: str, change: Change, message: str
) -> None:
    part = slice_rows(publish(publisher(arena, place), "FP32", tensor("FP32", 4)), 0, 4)
    change(part)
    with pytest.raises(InvalidRequest, match=message):
        reader.gather([part], "FP32", ITEM)
    assert reader.bytes_read == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arena_id", 1),
        ("epoch", 1),
        ("slot", 10**6),
        ("slot", 2**32 - 1),
        ("generation", 0),
        ("generation", 2),
        ("lease_expires_ns", 0),
        ("lease_expires_ns", 1),
    ],
)
def test_a_ref_to_what_was_not_published_is_not_proven(arena: AnyArena, reader: Reader, name: str, value: int) -> None:
    ref = publish(publisher(arena), "FP32", tensor("FP32", 4))
    setattr(ref.slot, name, value)
    with pytest.raises(ReadNotProven):
        reader.gather([slice_rows(ref, 0, 4)], "FP32", ITEM)


numbers = st.sampled_from([0, 1, 2, 4, 5, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
large = st.sampled_from([0, 1, 2**63 - 1, 2**64 - 1]) | st.integers(0, 2**64 - 1)
dimensions = st.sampled_from([-(2**63), -1, 0, 1, 3, 4, 5, 2**40, 2**59, 2**63 - 1])
CHANGES = st.one_of(
    st.builds(field, st.sampled_from(["row_start", "row_count", "ref.slot.slot"]), numbers),
    st.builds(
        field,
        st.sampled_from([f"ref.{n}" for n in ("nbytes", *(f"slot.{f}" for f in ("epoch", "generation")))]),
        large,
    ),
    st.builds(field, st.just("ref.dtype"), st.integers(-1, 20)),
    st.builds(field, st.just("ref.inline"), st.binary(max_size=300)),
    st.lists(dimensions, max_size=10).map(lambda values: shape(*values)),
    st.tuples(dimensions).map(lambda values: shape(*values, *ITEM)),
    st.just(huge),
    st.just(no_place),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(["inline", "slot"]), changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_whatever_a_peer_sends_the_reader_answers_with_bytes_or_one_of_its_errors(
    arena: AnyArena, reader: Reader, place: str, changes: list[Change]
) -> None:
    array = tensor("FP32", 4)
    ref = publish(publisher(arena, place), "FP32", array)
    part = slice_rows(ref, 0, 4)
    part = tensor_pb2.RowSlice.FromString(part.SerializeToString())
    for change in changes:
        change(part)
    try:
        batch = reader.gather([part], "FP32", ITEM)
    except MoselError as error:
        assert type(error) in (InvalidRequest, ReadNotProven)  # noqa: PT017
    else:
        assert batch.shape == (part.row_count, *ITEM)
        if part.ref.WhichOneof("place") == "slot":
            assert part.ref.shape == ref.shape
            assert np.array_equal(batch, array[part.row_start : part.row_start + part.row_count])
    publisher(arena).release([ref.slot])
