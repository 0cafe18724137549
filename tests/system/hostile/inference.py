"""Requests of the Open Inference Protocol over gRPC that nobody should send."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gateway.inference.messages import SERVICE, ModelInferRequest
from tests.gateway.inference.support import infer_request
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

INFER = f"/{SERVICE.full_name}/ModelInfer"
STREAM = f"/{SERVICE.full_name}/ModelStreamInfer"

Make = Callable[[random.Random], Hostile]


def raw_scents(rng: random.Random, **parameters: Any) -> Any:
    """A request that is answered, its elements as bytes."""
    array = np.random.default_rng(rng.randrange(2**32)).normal(0, 1, (rng.randint(1, 4), 6)).astype(np.float32)
    return infer_request({"scent": array}, **parameters)


def typed(request: Any) -> Any:
    """The same, its elements as values."""
    request.inputs[0].contents.fp32_contents.extend(np.frombuffer(request.raw_input_contents.pop(), np.float32))
    return request


def scents(rng: random.Random, **parameters: Any) -> Any:
    """Either of them."""
    request = raw_scents(rng, **parameters)
    return typed(request) if rng.random() < 0.3 else request


def refused(request: Any, says: str) -> Hostile:
    return Hostile(INFER, (request.SerializeToString(),), says=says)


def mutated_infer(rng: random.Random) -> Hostile:
    mutate = rng.choice([flipped, flipped, spliced])
    data = scents(rng, min_accuracy=0.7, priority=3).SerializeToString()
    return Hostile(INFER, (mutate(data, rng),), BY_CHANCE, gzip=rng.random() < 0.1)


def truncated_infer(rng: random.Random) -> Hostile:
    data = scents(rng).SerializeToString()
    return Hostile(INFER, (data[: rng.randrange(len(data))],), BY_CHANCE)


def random_infer(rng: random.Random) -> Hostile:
    return Hostile(INFER, (rng.choice([framed(rng), rng.randbytes(rng.randint(0, 200))]),), REFUSED)


def bad_utf8_infer(rng: random.Random) -> Hostile:
    broken = rng.choice([b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"fruit\x80"])
    field = rng.choice([b"\x0a", b"\x12", b"\x1a"])  # model, version, id
    return Hostile(INFER, (field + varint(len(broken)) + broken,), says="no message that ModelInfer knows")


def wrong_datatype(rng: random.Random) -> Hostile:
    request = raw_scents(rng)
    request.inputs[0].datatype = rng.choice(["", "fp32", "FP32 ", "FP64", "INT8", "BYTES", "BF16", "x" * 5000, "\0"])
    return refused(request, "datatype")


def wrong_infer_shape(rng: random.Random) -> Hostile:
    request = raw_scents(rng)
    del request.inputs[0].shape[:]
    request.inputs[0].shape.extend(shape(rng))
    return refused(request, "shape")


def wrong_raw(rng: random.Random) -> Hostile:
    request = raw_scents(rng)
    data = request.raw_input_contents.pop()
    kind = rng.choice(["short", "long", "empty", "many", "none", "both"])
    if kind in ("short", "long", "empty"):
        request.raw_input_contents.append({"short": data[:-1], "long": data + rng.randbytes(9), "empty": b""}[kind])
    elif kind == "many":
        request.raw_input_contents.extend([data] * rng.randint(2, 200))
    elif kind == "both":
        request.raw_input_contents.append(data)
        request.inputs[0].contents.fp32_contents.append(1.0)
    return refused(request, "scent" if kind != "many" else "raw_input_contents has")


def wrong_values(rng: random.Random) -> Hostile:
    request = typed(raw_scents(rng))
    contents = request.inputs[0].contents
    kind = rng.choice(["few", "many", "nan", "infinite", "other"])
    if kind == "few":
        del contents.fp32_contents[-1:]
    elif kind == "many":
        contents.fp32_contents.extend([0.0] * rng.randint(1, 1000))
    elif kind == "other":
        contents.ClearField("fp32_contents")
        contents.int_contents.extend([1] * 6)
    else:
        contents.fp32_contents[rng.randrange(6)] = float("nan") if kind == "nan" else -float("inf")
    return refused(request, "scent")


def unknown_infer_name(rng: random.Random) -> Hostile:
    request, name = raw_scents(rng), rng.choice(NAMES)
    where = rng.choice(["model", "version", "input", "output"])
    if where == "model":
        request.model_name = name
    elif where == "version":
        request.model_version = name or "77"
    elif where == "input":
        request.inputs[0].name = name
    else:
        request.outputs.add(name=name)
    status = NOT_FOUND if where in ("model", "version") else INVALID
    return Hostile(INFER, (request.SerializeToString(),), frozenset({status}), "expected")


def wrong_parameter(rng: random.Random) -> Hostile:
    nan, inf = float("nan"), float("inf")
    name, value = rng.choice(
        [
            *(("min_accuracy", value) for value in (nan, inf, -0.1, 1.5, "much", True)),
            *(("latency_slo_ms", value) for value in (nan, -1.0, 0, "soon", False)),
            *(("timeout", value) for value in (-1, -(2**63), 0.5, "never", True)),
            *(("priority", value) for value in (-1, 10, 2**40, 2.5, "first")),
            *(("modalities", value) for value in ("taste", "scent,scent,taste", 7, ",")),
            *(("policy", value) for value in ("worst", 1)),
            *(("effort", value) for value in ("none", 0)),
            *(("late_ok", value) for value in ("yes", 2)),
            *(("sequence_id", value) for value in (7, "a")),
            ("sequence_start", True),
            ("shared_memory_region", "secrets"),
            *((unknown, 1) for unknown in NAMES if unknown and "\0" not in unknown),
        ]
    )
    return refused(raw_scents(rng, **{name: value}), "")


def twice(rng: random.Random) -> Hostile:
    """The same input more than once, or thousands of inputs."""
    request = raw_scents(rng)
    data = request.raw_input_contents[0]
    for _ in range(rng.choice([1, 3, 2000])):
        request.inputs.add().CopyFrom(request.inputs[0])
        request.raw_input_contents.append(data)
    return refused(request, "scent")


def infer_bomb(rng: random.Random) -> Hostile:
    request = ModelInferRequest(model_name="fruit")
    request.raw_input_contents.append(bytes(rng.randint(70, 100) * MIB))
    allowed = frozenset({Status.RESOURCE_EXHAUSTED})
    return Hostile(INFER, (request.SerializeToString(),), allowed, "larger than max", gzip=True)


def wrong_infer_stream(rng: random.Random) -> Hostile:
    """What is wrong with one request is told inside the stream."""
    bad = rng.choice([wrong_datatype, wrong_infer_shape, wrong_raw, wrong_values, unknown_infer_name, wrong_parameter])
    good = raw_scents(rng).SerializeToString()
    messages = [good, bad(rng).messages[0], good]
    rng.shuffle(messages)
    return Hostile(STREAM, tuple(messages[: rng.randint(2, 3)]), frozenset({INVALID, Status.OK}))


def garbage_stream(rng: random.Random) -> Hostile:
    messages = [rng.choice([b"\xff" * 7, flipped(scents(rng).SerializeToString(), rng)]) for _ in range(3)]
    return Hostile(STREAM, tuple(messages), BY_CHANCE)


def other_infer_method(rng: random.Random) -> Hostile:
    name = rng.choice(NAMES[1:]).encode()
    as_name = b"\x0a" + varint(len(name)) + name
    if rng.random() < 0.4:
        method = rng.choice(
            ["SystemSharedMemoryRegister", "CudaSharedMemoryStatus", "TraceSetting", "LogSettings", "X"]
        )
        return Hostile(f"/{SERVICE.full_name}/{method}", (as_name,), frozenset({Status.UNIMPLEMENTED}))
    method = rng.choice(["ModelMetadata", "ModelConfig", "ModelStatistics"])
    data, status = rng.choice([(as_name, NOT_FOUND), (b"\xff" * 7, INVALID)])
    return Hostile(f"/{SERVICE.full_name}/{method}", (data,), frozenset({status}))


# Calls of each kind.
INFERENCE: Mapping[Make, int] = {
    mutated_infer: 900,
    truncated_infer: 250,
    random_infer: 300,
    bad_utf8_infer: 100,
    wrong_datatype: 200,
    wrong_infer_shape: 300,
    wrong_raw: 200,
    wrong_values: 150,
    unknown_infer_name: 200,
    wrong_parameter: 300,
    twice: 50,
    infer_bomb: 2,
    wrong_infer_stream: 150,
    garbage_stream: 98,
    other_infer_method: 100,
}
