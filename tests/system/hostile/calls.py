"""What hostile calls are made of: bytes that are no message, names and shapes that nobody should send."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import grpc

Status = grpc.StatusCode
INVALID, NOT_FOUND = Status.INVALID_ARGUMENT, Status.NOT_FOUND
# What a caller may be told who can only be wrong, and what mutations may turn into by chance.
REFUSED = frozenset(
    {INVALID, NOT_FOUND, Status.FAILED_PRECONDITION, Status.RESOURCE_EXHAUSTED, Status.DEADLINE_EXCEEDED}
)
BY_CHANCE = REFUSED | {Status.OK}
MIB = 1024 * 1024

NAMES = [
    *("", "Fruit", " fruit", "fruit ", "fruit\0", "../fruit", "/etc/passwd", "fruit;id", "a\nb\r\nc", "\x1b[31mred"),
    *("%s%n", "{0.__class__}", "\u202efruit", "\U0001f34e" * 50, "x" * 10_000, "\u00e4" * 20_000, "photo,scent"),
]

T = TypeVar("T")


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


def calls(kinds: Mapping[Callable[[random.Random], T], int], seed: int) -> Iterator[tuple[str, T]]:
    """So many calls of each kind, mixed, each with the name of its kind; the same seed gives the same ones."""
    rng = random.Random(seed)
    made = [make for make, count in kinds.items() for _ in range(count)]
    rng.shuffle(made)
    for make in made:
        yield make.__name__, make(rng)


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


def shape(rng: random.Random) -> list[int]:
    """A shape that no [items, 6] has."""
    huge = rng.choice([2**31, 2**32, 2**62, 2**63 - 1])
    return rng.choice(
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
