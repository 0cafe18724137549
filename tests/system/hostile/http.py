"""Requests of the Open Inference Protocol over HTTP that nobody should send."""

import gzip
import json
import random
import urllib.parse
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.system.hostile.calls import MIB, NAMES, flipped, shape, spliced

INFER = "/v2/models/fruit/infer"
_BINARY_LENGTH = "Inference-Header-Content-Length"
REFUSED = frozenset({400, 404, 413, 422, 429, 504})
BY_CHANCE = REFUSED | {200}


@dataclass(frozen=True)
class HostileHttp:
    """One request.

    Attributes:
        path: with the query.
        body: what is sent.
        allowed: statuses that answer it.
        says: what the message has in it; None: the server itself refuses, in its own words.
        headers: beside those that every request has.
        method: of HTTP.
    """

    path: str
    body: bytes
    allowed: frozenset[int] = frozenset({400})
    says: str | None = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    method: str = "POST"


Make = Callable[[random.Random], HostileHttp]


def asked(rng: random.Random) -> dict[str, Any]:
    """A request that is answered."""
    rows = np.random.default_rng(rng.randrange(2**32)).normal(0, 1, (rng.randint(1, 3), 6)).round(3)
    tensor = {"name": "scent", "datatype": "FP32", "shape": [*rows.shape], "data": rows.ravel().tolist()}
    return {"inputs": [tensor], "parameters": {"min_accuracy": 0.7}}


def refused(content: Any, says: str = "") -> HostileHttp:
    return HostileHttp(INFER, json.dumps(content).encode(), says=says)


def mutated_json(rng: random.Random) -> HostileHttp:
    data = json.dumps(asked(rng)).encode()
    return HostileHttp(INFER, rng.choice([flipped, flipped, spliced])(data, rng), BY_CHANCE)


def truncated_json(rng: random.Random) -> HostileHttp:
    data = json.dumps(asked(rng)).encode()
    return HostileHttp(INFER, data[: rng.randrange(len(data))])


def no_json(rng: random.Random) -> HostileHttp:
    nested = rng.choice(["[", '{"a":', '{"inputs":['])
    text = rng.choice([b"", b"null", b"[]", b"0", b'"a"', b"{}", b"\xff\xfe{}", b"{,}", rng.randbytes(99)])
    return HostileHttp(INFER, rng.choice([text, nested.encode() * rng.choice([10, 1_000, 100_000])]))


def wrong_field(rng: random.Random) -> HostileHttp:
    content = asked(rng)
    other: Any = rng.choice([None, 7, -1.5, "x", [], {}, [[]], True, "x" * 5000])
    where = rng.choice(["inputs", "name", "datatype", "shape", "data", "id", "outputs", "parameters"])
    if where in ("inputs", "id", "outputs", "parameters"):
        content[where] = other
    else:
        content["inputs"][0][where] = other
    # Some of them ask for nothing, or say it in another way.
    return HostileHttp(INFER, json.dumps(content).encode(), BY_CHANCE)


def wrong_json_shape(rng: random.Random) -> HostileHttp:
    content = asked(rng)
    content["inputs"][0]["shape"] = rng.choice([shape(rng), [2.5, 6], ["2", 6], [True, 6], [10**30, 6], [None]])
    return HostileHttp(INFER, json.dumps(content).encode(), frozenset({400, 413}), "shape")


def wrong_element(rng: random.Random) -> HostileHttp:
    content = asked(rng)
    data = content["inputs"][0]["data"]
    element = rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1e39", '"a"', "null", "[]", "true", "9" * 5000])
    data[rng.randrange(len(data))] = "HERE"
    return HostileHttp(INFER, json.dumps(content).replace('"HERE"', element).encode())


def wrong_json_parameter(rng: random.Random) -> HostileHttp:
    content = asked(rng)
    content["parameters"] = rng.choice(
        [
            {"min_accuracy": 7},
            {"min_accuracy": "NaN"},
            {"latency_slo_ms": -1},
            {"timeout": -5},
            {"timeout": 10**40},
            {"priority": 99},
            {"modalities": "taste"},
            {"sequence_id": 3},
            {"binary_data_output": "yes"},
            {rng.choice(NAMES) or "empty": 1},
        ]
    )
    return refused(content)


def wrong_binary(rng: random.Random) -> HostileHttp:
    content, raw = asked(rng), rng.randbytes(rng.randint(0, 100))
    tensor = content["inputs"][0]
    size = rng.choice([-1, 0, 1, len(raw) + 1, 10**30, "24", 2.5, True, None])
    del tensor["data"]
    tensor["parameters"] = {"binary_data_size": size}
    head = json.dumps(content).encode()
    length = rng.choice(["-1", "x", "", "9" * 30, str(len(head) + len(raw) + 1), "1e3", str(len(head)), "0"])
    return HostileHttp(INFER, head + raw, headers={_BINARY_LENGTH: length})


def compressed_body(rng: random.Random) -> HostileHttp:
    data = json.dumps(asked(rng)).encode()
    encoding, body = rng.choice(
        [
            ("gzip", data),
            ("gzip", gzip.compress(data)[:-5]),
            ("gzip", flipped(gzip.compress(data), rng)[:40]),
            ("gzip", gzip.compress(data) + b"more"),
            ("deflate", data),
            ("deflate", zlib.compress(data)[:-3]),
            ("br", data),
            ("gzip, gzip", gzip.compress(data)),
            ("x" * 2000, data),
        ]
    )
    return HostileHttp(INFER, body, headers={"content-encoding": encoding})


def bomb(rng: random.Random) -> HostileHttp:
    """A few hundred KiB that would be hundreds of MiB."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, rng.choice([31, 15]))
    piece = b" " * MIB
    body = b"".join(compressor.compress(piece) for _ in range(rng.randint(80, 300))) + compressor.flush()
    encoding = "gzip" if body.startswith(b"\x1f\x8b") else "deflate"
    return HostileHttp(INFER, body, frozenset({413}), "max_message_mib", {"content-encoding": encoding})


def too_large(rng: random.Random) -> HostileHttp:
    return HostileHttp(INFER, bytes(65 * MIB), frozenset({413}), "max_message_mib")


def wrong_path(rng: random.Random) -> HostileHttp:
    name = urllib.parse.quote(rng.choice(NAMES), safe="")[:20_000]
    path = rng.choice(
        [f"/v2/models/{name}x/infer", f"/v2/models/fruit/versions/{name}7/infer", f"/{name}", "/v2//infer"]
    )
    body = json.dumps(asked(rng)).encode()
    # Longer paths than the server reads are refused by itself.
    return HostileHttp(path, body, frozenset({400, 404}), None if len(path) > 5000 else "")


def wrong_method(rng: random.Random) -> HostileHttp:
    method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "BREW"])
    return HostileHttp(INFER, b"", frozenset({405}), "method", method=method)


# Requests of each kind.
HTTP: Mapping[Make, int] = {
    mutated_json: 500,
    truncated_json: 150,
    no_json: 150,
    wrong_field: 200,
    wrong_json_shape: 200,
    wrong_element: 150,
    wrong_json_parameter: 150,
    wrong_binary: 150,
    compressed_body: 150,
    bomb: 4,
    too_large: 2,
    wrong_path: 150,
    wrong_method: 50,
}
