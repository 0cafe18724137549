"""Items that arrive in batches, and what they may take of memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.jobs.checks import CheckedJob
from gateway.jobs.upload import ArrivingBytes, JobUpload
from mosel.errors import InvalidRequest, MoselError, Overloaded, PayloadTooLarge
from mosel.packages.model_package import ModelPackage
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
# Of one item.
PHOTO_BYTES, SCENT_BYTES = 24 * 24 * 3, 6 * 4


def job_of(package: ModelPackage, size: int, *modalities: str) -> CheckedJob:
    return CheckedJob(package, size, modalities or ("photo", "scent"), None, None, False, gateway_pb2.BEST, False)


def batch_of(payloads: Payloads, items: slice = slice(None)) -> gateway_pb2.ItemBatch:
    return gateway_pb2.ItemBatch(payloads={name: to_proto(array[items]) for name, array in payloads.items()})


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_batches_are_put_together_in_order(fruit: ModelPackage, draw: Draw, sizes: list[int]) -> None:
    payloads, upload = draw(sum(sizes)), JobUpload(job_of(fruit, sum(sizes)), max_items=9)
    for number, size in enumerate(sizes):
        assert not upload.complete
        upload.add(batch_of(payloads, slice(upload.received, upload.received + size)))
        assert upload.received == sum(sizes[: number + 1])
    assert upload.complete
    for name, array in payloads.items():
        np.testing.assert_array_equal(upload.payloads[name], array)


BAD_BATCHES: dict[str, tuple[Callable[[Payloads], Payloads], type[MoselError], str]] = {
    "nothing": (lambda p: {}, InvalidRequest, "items.payloads is empty; expected some of photo, scent"),
    "unknown": (lambda p: p | {"taste": p["scent"]}, InvalidRequest, "items.payloads has 'taste'; expected some of"),
    "missing": (
        lambda p: {"scent": p["scent"]},
        InvalidRequest,
        "items.payloads has scent; expected photo, scent in each batch",
    ),
    "different": (
        lambda p: p | {"scent": p["scent"][:1]},
        InvalidRequest,
        "items.payloads have different numbers of items",
    ),
    "dtype": (
        lambda p: p | {"scent": p["scent"].astype(np.float64)},
        InvalidRequest,
        "items.payloads.scent.dtype is FP64; expected FP32",
    ),
    "NaN": (
        lambda p: p | {"scent": p["scent"] * np.nan},
        InvalidRequest,
        "items.payloads.scent has nan in item 0; expected finite numbers",
    ),
    "too many": (
        lambda p: {name: array.repeat(2, axis=0) for name, array in p.items()},
        InvalidRequest,
        "items: 5 have arrived; expected 4, the size of the job",
    ),
    "far too many": (
        lambda p: {name: array.repeat(9, axis=0) for name, array in p.items()},
        PayloadTooLarge,
        "items.payloads.photo.shape is",
    ),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_a_bad_batch_is_refused_and_changes_nothing(
    fruit: ModelPackage,
    draw: Draw,
    change: Callable[[Payloads], Payloads],
    kind: type[MoselError],
    message: str,
) -> None:
    payloads, upload = draw(4), JobUpload(job_of(fruit, 4), max_items=9)
    upload.add(batch_of(payloads, slice(1)))
    with pytest.raises(kind) as refused:
        upload.add(batch_of(change({name: array[1:3] for name, array in payloads.items()})))
    assert str(refused.value).startswith(message)
    upload.add(batch_of(payloads, slice(1, 4)))
    np.testing.assert_array_equal(upload.payloads["photo"], payloads["photo"])


def test_only_the_modalities_of_the_job_are_taken(fruit: ModelPackage, draw: Draw) -> None:
    upload = JobUpload(job_of(fruit, 2, "scent"), max_items=9)
    assert list(upload.payloads) == ["scent"]
    with pytest.raises(InvalidRequest, match=r"^items\.payloads has photo, scent; expected scent in each batch$"):
        upload.add(batch_of(draw(2)))


def test_what_arrives_is_bounded(fruit: ModelPackage) -> None:
    item = PHOTO_BYTES + SCENT_BYTES
    arriving = ArrivingBytes(largest=10 * PHOTO_BYTES, limit=15 * item, setting="transport.gateway_arena_mib")
    with arriving.reserve(job_of(fruit, 10)):
        assert arriving.statistics() == {"arriving_bytes": 10 * item}
        with arriving.reserve(job_of(fruit, 5)):
            pass
        with pytest.raises(Overloaded, match=f"take {10 * item} of {15 * item} bytes"), reserved(arriving, fruit, 6):
            pass
    with reserved(arriving, fruit, 6):
        pass
    assert arriving.statistics() == {"arriving_bytes": 0}


def reserved(arriving: ArrivingBytes, package: ModelPackage, size: int) -> Any:
    return arriving.reserve(job_of(package, size))


def test_a_job_that_never_fits_is_told_the_limit(fruit: ModelPackage) -> None:
    arriving = ArrivingBytes(largest=10 * PHOTO_BYTES, limit=15 * PHOTO_BYTES, setting="transport.gateway_arena_mib")
    message = rf"size is 11: photo would have {11 * PHOTO_BYTES} bytes; expected at most {10 * PHOTO_BYTES} bytes"
    with pytest.raises(PayloadTooLarge, match=message), reserved(arriving, fruit, 11):
        pass
    twice = replace(fruit, modalities={"photo": fruit.modalities["photo"], "scent": fruit.modalities["photo"]})
    message = rf"size is 8: the payloads would have {16 * PHOTO_BYTES} bytes; expected at most {15 * PHOTO_BYTES}"
    with pytest.raises(PayloadTooLarge, match=message), reserved(arriving, twice, 8):
        pass
    assert arriving.statistics() == {"arriving_bytes": 0}
