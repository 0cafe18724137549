"""Requests that nobody should send, for `mosel.v1`: from bytes that are no message to numbers that are none."""

import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import grpc
import numpy as np

from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2

Status = grpc.StatusCode
INVALID, NOT_FOUND = Status.INVALID_ARGUMENT, Status.NOT_FOUND
# What a caller may be told who can only be wrong, and what mutations may turn into by chance.
REFUSED = frozenset(
    {INVALID, NOT_FOUND, Status.FAILED_PRECONDITION, Status.RESOURCE_EXHAUSTED, Status.DEADLINE_EXCEEDED}
)
BY_CHANCE = REFUSED | {Status.OK}

PREDICT = "/mosel.v1.Gateway/Predict"
SUBMIT = "/mosel.v1.Gateway/SubmitJob"
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Hostile:
    """One call.

    Attributes:
        method: its full name.
        messages: what is sent; several if it is a stream.
        allowed: statuses that answer it.
        says: what the message has in it; None: there need be none.
        gzip: it is sent compressed.
        timeout_s: of the call.
    """

    method: str
    messages: tuple[bytes, ...]
    allowed: frozenset[Status] = frozenset({INVALID})
    says: str | None = ""
    gzip: bool = False
    timeout_s: float = 30.0


Make = Callable[[random.Random], Hostile]


def calls(kinds: Mapping[Make, int], seed: int) -> Iterator[tuple[str, Hostile]]:
    """So many calls of each kind, mixed, each with the name of its kind; the same seed gives the same ones."""
    rng = random.Random(seed)
    made = [make for make, count in kinds.items() for _ in range(count)]
    rng.shuffle(made)
    for make in made:
        yield make.__name__, make(rng)


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


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Some bits the other way; half of the time near the beginning, where the structure is."""
    changed = bytearray(data)
    end = len(data) if rng.random() < 0.5 else min(len(data), 64)
    for _ in range(rng.randint(1, 16)):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def spliced(data: bytes, rng: random.Random) -> bytes:
    """A piece of it once more, or missing, or somewhere else."""
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    at = rng.randrange(len(data))
    return rng.choice([data[:start] + data[end:], data[:at] + data[start:end] + data[at:]])


def framed(rng: random.Random, depth: int = 3) -> bytes:
    """Fields of random numbers, wire types and content: valid framing, and no message that anybody knows."""
    fields = []
    for _ in range(rng.randint(1, 8)):
        number, kind = rng.choice([rng.randint(1, 9), rng.randint(1, 2**29 - 1)]), rng.choice([0, 1, 2, 2, 2, 5])
        content = {
            0: varint(rng.getrandbits(rng.choice([1, 7, 32, 64]))),
            1: rng.randbytes(8),
            2: _delimited(rng, depth),
            5: rng.randbytes(4),
        }[kind]
        fields.append(varint(number << 3 | kind) + content)
    return b"".join(fields)


def _delimited(rng: random.Random, depth: int) -> bytes:
    inner = framed(rng, depth - 1) if depth and rng.random() < 0.5 else rng.randbytes(rng.randint(0, 40))
    return varint(len(inner)) + inner


def varint(value: int) -> bytes:
    """A number as protobuf writes it."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


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
    request, huge = scents(rng), rng.choice([2**31, 2**32, 2**62, 2**63 - 1])
    del request.payloads["scent"].shape[:]
    request.payloads["scent"].shape.extend(
        rng.choice(
            [
                [],
                [0],
                [6],
                [0, 6],
                [-1, 6],
                [-(2**63), 6],
                [1, -6],
                [huge, 6],
                [6, huge],
                [huge, huge],
                [huge] * rng.randint(3, 30),
                [1] * 100,
                [0] * 100,
                [-1] * 100,
                [rng.randint(-9, 9)] * rng.randint(1_000, 20_000),
            ]
        )
    )
    return Hostile(PREDICT, (request.SerializeToString(),), says="payloads.scent.shape")


def wrong_length(rng: random.Random) -> Hostile:
    request = scents(rng)
    data = request.payloads["scent"].data
    changed = rng.choice([b"", data[:-1], data[: len(data) // 2], data + b"\0", data * 2, data + rng.randbytes(4096)])
    request.payloads["scent"].data = changed
    return Hostile(PREDICT, (request.SerializeToString(),), says=f"payloads.scent.data has {len(changed)} bytes")


def unknown_name(rng: random.Random) -> Hostile:
    request, name = scents(rng), rng.choice(_NAMES)
    where = rng.choice(["model", "payload", "modality"])
    if where == "model":
        request.model = name
        return Hostile(PREDICT, (request.SerializeToString(),), frozenset({NOT_FOUND}), "model is '")
    if where == "payload":
        request.payloads[name].CopyFrom(request.payloads["scent"])
        return Hostile(PREDICT, (request.SerializeToString(),), says="payloads has '")
    request.modalities.append(name)
    return Hostile(PREDICT, (request.SerializeToString(),), says="modalities has '")


_NAMES = [
    *("", "Fruit", " fruit", "fruit ", "fruit\0", "../fruit", "/etc/passwd", "fruit;id", "a\nb\r\nc", "\x1b[31mred"),
    *("%s%n", "{0.__class__}", "\u202efruit", "\U0001f34e" * 50, "x" * 10_000, "\u00e4" * 20_000, "photo,scent"),
]


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
    request.payloads["photo"].data = bytes(65 * _MIB)
    return Hostile(PREDICT, (request.SerializeToString(),), frozenset({Status.RESOURCE_EXHAUSTED}), "larger than max")


def compressed_bomb(rng: random.Random) -> Hostile:
    """A hundred KiB on the wire."""
    request = gateway_pb2.PredictRequest(model="fruit")
    request.payloads["photo"].data = bytes(rng.randint(70, 120) * _MIB)
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
    mutated_request: 2000,
    truncated_request: 800,
    random_bytes: 500,
    random_fields: 700,
    bad_utf8: 200,
    wrong_dtype: 400,
    not_finite: 300,
    wrong_shape: 700,
    wrong_length: 500,
    unknown_name: 500,
    wrong_number: 500,
    no_time: 300,
    too_large: 2,
    compressed_bomb: 4,
    compressed_mutation: 294,
    wrong_stream: 500,
    mutated_stream: 500,
    other_method: 200,
    unknown_method: 100,
}
