"""Requests of `mosel.v1` that nobody should send, from bytes that are no message to numbers that are none."""

import random
import struct
from collections.abc import Callable, Mapping

import numpy as np

from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2
from tests.system.hostile.calls import (
    BY_CHANCE,
    INVALID,
    MIB,
    NAMES,
    NOT_FOUND,
    REFUSED,
    Hostile,
    Status,
    flipped,
    framed,
    shape,
    spliced,
    varint,
)

PREDICT = "/mosel.v1.Gateway/Predict"
SUBMIT = "/mosel.v1.Gateway/SubmitJob"


Make = Callable[[random.Random], Hostile]


def good(rng: random.Random) -> gateway_pb2.PredictRequest:
    """A request that is answered."""
    size, numbers = rng.randint(1, 4), np.random.default_rng(rng.randrange(2**32))
    payloads = {
        "photo": numbers.integers(0, 256, (size, 24, 24, 3), np.uint8),
        "scent": numbers.normal(0, 1, (size, 6)).astype(np.float32),
    }
    for name in rng.sample([*payloads], rng.choice([0, 0, 1])):
        del payloads[name]
    return gateway_pb2.PredictRequest(
        model="fruit",
        payloads={name: to_proto(array) for name, array in payloads.items()},
        min_accuracy=rng.choice([None, 0.7]),
        latency_slo_ms=rng.choice([None, 20_000.0]),
        priority=rng.choice([0, 5]),
    )


def scents(rng: random.Random) -> gateway_pb2.PredictRequest:
    """The same with one small payload."""
    array = np.random.default_rng(rng.randrange(2**32)).normal(0, 1, (rng.randint(1, 4), 6)).astype(np.float32)
    return gateway_pb2.PredictRequest(model="fruit", payloads={"scent": to_proto(array)})


# Bytes


def mutated_request(rng: random.Random) -> Hostile:
    mutate = rng.choice([flipped, flipped, flipped, spliced])
    return Hostile(PREDICT, (mutate(good(rng).SerializeToString(), rng),), BY_CHANCE)


def truncated_request(rng: random.Random) -> Hostile:
    data = good(rng).SerializeToString()
    return Hostile(PREDICT, (data[: rng.randrange(len(data))],), BY_CHANCE)


def random_bytes(rng: random.Random) -> Hostile:
    return Hostile(PREDICT, (rng.randbytes(rng.randint(0, 200)),), REFUSED)


def random_fields(rng: random.Random) -> Hostile:
    return Hostile(PREDICT, (framed(rng),), REFUSED)


def bad_utf8(rng: random.Random) -> Hostile:
    broken = rng.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"fruit\x80"])
    as_model = b"\x0a" + varint(len(broken)) + broken
    entry = b"\x0a" + varint(len(broken)) + broken
    as_key = b"\x0a\x05fruit\x12" + varint(len(entry)) + entry
    return Hostile(PREDICT, (rng.choice([as_model, as_key]),), says="no message that Predict knows")


# Fields


def wrong_dtype(rng: random.Random) -> Hostile:
    request = scents(rng)
    request.payloads["scent"].dtype = rng.choice(  # type: ignore[assignment]
        [0, 1, 2, 3, 7, 8, 10, 11, 99, -1, 2**31 - 1, -(2**31)]
    )
    return Hostile(PREDICT, (request.SerializeToString(),), says="dtype")


def not_finite(rng: random.Random) -> Hostile:
    request = scents(rng)
    data = bytearray(request.payloads["scent"].data)
    bits = rng.choice([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF])
    struct.pack_into("<I", data, 4 * rng.randrange(len(data) // 4), bits)
    request.payloads["scent"].data = bytes(data)
    return Hostile(PREDICT, (request.SerializeToString(),), says="expected finite numbers")


def wrong_shape(rng: random.Random) -> Hostile:
    request = scents(rng)
    del request.payloads["scent"].shape[:]
    request.payloads["scent"].shape.extend(shape(rng))
    return Hostile(PREDICT, (request.SerializeToString(),), says="payloads.scent.shape")


def wrong_length(rng: random.Random) -> Hostile:
    request = scents(rng)
    data = request.payloads["scent"].data
    changed = rng.choice([b"", data[:-1], data[: len(data) // 2], data + b"\0", data * 2, data + rng.randbytes(4096)])
    request.payloads["scent"].data = changed
    return Hostile(PREDICT, (request.SerializeToString(),), says=f"payloads.scent.data has {len(changed)} bytes")


def unknown_name(rng: random.Random) -> Hostile:
    request, name = scents(rng), rng.choice(NAMES)
    where = rng.choice(["model", "payload", "modality"])
    if where == "model":
        request.model = name
        return Hostile(PREDICT, (request.SerializeToString(),), frozenset({NOT_FOUND}), "model is '")
    if where == "payload":
        request.payloads[name].CopyFrom(request.payloads["scent"])
        return Hostile(PREDICT, (request.SerializeToString(),), says="payloads has '")
    request.modalities.append(name)
    return Hostile(PREDICT, (request.SerializeToString(),), says="modalities has '")


def wrong_number(rng: random.Random) -> Hostile:
    request, nan, inf = scents(rng), float("nan"), float("inf")
    field, value = rng.choice(
        [
            *(("min_accuracy", value) for value in (nan, inf, -inf, -1e-9, 1.000001, 1e308, -1e308)),
            *(("latency_slo_ms", value) for value in (nan, inf, -inf, 0.0, -0.0, -1.0, -1e308)),
            *(("priority", value) for value in (10, 2**31, 2**32 - 1)),
            *(("effort", value) for value in (3, -1, 2**31 - 1, -(2**31))),
        ]
    )
    setattr(request, field, value)
    return Hostile(PREDICT, (request.SerializeToString(),), says=f"{field} is ")


def no_time(rng: random.Random) -> Hostile:
    """A deadline that nobody can meet, in the request or on the call; the call's may be negative."""
    request = good(rng)
    late = frozenset({Status.DEADLINE_EXCEEDED, Status.FAILED_PRECONDITION, Status.RESOURCE_EXHAUSTED})
    if rng.random() < 0.5:
        return Hostile(PREDICT, (request.SerializeToString(),), late, timeout_s=rng.choice([-1.0, 0.0, 1e-6, 1e-4]))
    request.latency_slo_ms = rng.choice([5e-324, 1e-9, 1e-3, 0.05])
    return Hostile(PREDICT, (request.SerializeToString(),), late)


# Sizes


def too_large(rng: random.Random) -> Hostile:
    request = gateway_pb2.PredictRequest(model="fruit")
    request.payloads["photo"].data = bytes(65 * MIB)
    return Hostile(PREDICT, (request.SerializeToString(),), frozenset({Status.RESOURCE_EXHAUSTED}), "larger than max")


def compressed_bomb(rng: random.Random) -> Hostile:
    """A hundred KiB on the wire."""
    request = gateway_pb2.PredictRequest(model="fruit")
    request.payloads["photo"].data = bytes(rng.randint(70, 120) * MIB)
    data, allowed = request.SerializeToString(), frozenset({Status.RESOURCE_EXHAUSTED})
    return Hostile(PREDICT, (data,), allowed, "larger than max", gzip=True)


def compressed_mutation(rng: random.Random) -> Hostile:
    return Hostile(PREDICT, (flipped(good(rng).SerializeToString(), rng),), BY_CHANCE, gzip=True)


# Streams


def wrong_stream(rng: random.Random) -> Hostile:
    """Messages of a job that do not belong together, or are none."""
    request = scents(rng)
    size = request.payloads["scent"].shape[0]
    garbage = b"\xff" * 9

    def spec(**fields: object) -> bytes:
        asked = gateway_pb2.JobSpec(**({"model": "fruit", "size": size, "modalities": ["scent"]} | fields))  # type: ignore[arg-type]
        return gateway_pb2.SubmitJobRequest(job=asked).SerializeToString()

    items = gateway_pb2.SubmitJobRequest(items=gateway_pb2.ItemBatch(payloads=request.payloads)).SerializeToString()
    if rng.random() < 0.2:
        # What comes after all items may come when the job is over.
        return Hostile(SUBMIT, (spec(), items, rng.choice([items, garbage])), frozenset({INVALID, Status.OK}))
    messages: list[tuple[bytes, ...]] = [
        (),
        (b"",),
        (items,),
        (garbage,),
        (spec(), garbage),
        (spec(), b""),
        (spec(), spec()),
        (spec(size=size + 1), items),
        (spec(size=0), items),
        (spec(size=2**32 - 1), items),
        (spec(modalities=["photo", "scent"]), items),
        (spec(modalities=["taste"]), items),
        (spec(min_accuracy=float("nan")), items),
        (spec(latency_slo_ms=-1.0), items),
        (spec(priority=10), items),
    ]
    return Hostile(SUBMIT, rng.choice(messages))


def mutated_stream(rng: random.Random) -> Hostile:
    request = scents(rng)
    spec = gateway_pb2.JobSpec(model="fruit", size=request.payloads["scent"].shape[0], modalities=["scent"])
    messages = [
        gateway_pb2.SubmitJobRequest(job=spec).SerializeToString(),
        gateway_pb2.SubmitJobRequest(items=gateway_pb2.ItemBatch(payloads=request.payloads)).SerializeToString(),
    ]
    at = rng.randrange(2)
    messages[at] = rng.choice([flipped, spliced])(messages[at], rng)
    return Hostile(SUBMIT, tuple(messages), BY_CHANCE)


# Other methods


def other_method(rng: random.Random) -> Hostile:
    name, likely = rng.choice(
        [
            ("mosel.v1.Gateway/Plan", b""),
            ("mosel.v1.Gateway/Plan", b"\x0a\x09\x0a\x05fruit\x10\x00"),
            ("mosel.v1.Gateway/GetJob", b"\x0a\x200123456789abcdef0123456789abcdef"),
            ("mosel.v1.Gateway/GetJob", b"\x0a\x05fruit"),
            ("mosel.v1.Gateway/CancelJob", b"\x0a\x20ffffffffffffffffffffffffffffffff"),
            ("mosel.v1.Gateway/CancelJob", b""),
            ("grpc.health.v1.Health/Check", b"\x0a\x05pears"),
        ]
    )
    data = rng.choice([likely, b"\xff" * 7])
    # grpc's own health service says no more than NOT_FOUND of a service that it does not know.
    says = None if name.endswith("Check") and data == likely else ""
    return Hostile(f"/{name}", (data,), frozenset({INVALID, NOT_FOUND}), says)


def unknown_method(rng: random.Random) -> Hostile:
    service = rng.choice(["mosel.v1.Gateway", "mosel.v1.Selector", "mosel.v1.Encoder", "grpc.Nothing", "x" * 2000])
    method = rng.choice(["Guess", "Connect", "Encode", "__init__", "%00", "predict"])
    return Hostile(f"/{service}/{method}", (framed(rng),), frozenset({Status.UNIMPLEMENTED}))


# Calls of each kind.
MOSEL: Mapping[Make, int] = {
    mutated_request: 1200,
    truncated_request: 400,
    random_bytes: 300,
    random_fields: 400,
    bad_utf8: 150,
    wrong_dtype: 250,
    not_finite: 200,
    wrong_shape: 400,
    wrong_length: 250,
    unknown_name: 300,
    wrong_number: 300,
    no_time: 200,
    too_large: 2,
    compressed_bomb: 3,
    compressed_mutation: 195,
    wrong_stream: 250,
    mutated_stream: 250,
    other_method: 100,
    unknown_method: 50,
}
