"""Two processes, and kill -9 of either at random points: nothing torn is accepted, nothing is lost, nothing is left.

Children are forked from a server that has imported the transport once, so that 200 of them cost little.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mosel.transport import Reader, SharedMemoryArena
from mosel.transport.control import remove_orphans
from tests.mosel.transport.kill_sides import (
    ACCEPTED,
    LEASE_S,
    REFUSED,
    TORN,
    WOULD_TEAR,
    Consumer,
    Producer,
    consume,
    produce,
)

KILLS = 100  # of each side
# Some children die before they are ready, most in the middle of the traffic.
LIVES_S = (0.0, 0.12)


@pytest.fixture(scope="module")
def context() -> Iterator[ForkServerContext]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.mosel.transport.kill_sides"])
    yield context
    # The server outlives its children; it would keep this process's folders and pipes in use.
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def maps(folder: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(folder))


@contextlib.contextmanager
def killed_at_the_end(process: BaseProcess, *theirs: Connection) -> Iterator[None]:
    process.start()
    for connection in theirs:
        connection.close()
    try:
        yield
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL, "it died before it was killed"
        process.close()


def beside_a_producer(context: ForkServerContext, reader: Reader, folder: Path, seed: int) -> Counter[bytes]:
    """Reads from a producer that is killed, during its life and what is left in the pipe after it."""
    here, there = context.Pipe()
    life_s = random.uniform(*LIVES_S)
    consumer: Consumer | None = None
    with contextlib.closing(here), contextlib.suppress(EOFError, ConnectionResetError):
        with killed_at_the_end(context.Process(target=produce, args=(str(folder), there, seed)), there):
            if here.poll(life_s) or life_s > LIVES_S[1] / 4:
                consumer = Consumer(reader, here)
                until = time.monotonic() + life_s
                while time.monotonic() < until:
                    consumer.step()
        while consumer:
            consumer.step()
    if consumer is None:
        return Counter()
    reader.close(consumer.arena.arena_id, consumer.arena.epoch)
    return consumer.counts


def test_100_producers_are_killed(shm: Path, context: ForkServerContext) -> None:
    random.seed(3)
    counts: Counter[bytes] = Counter()
    with Reader(shm) as reader:
        beside_a_producer(context, reader, shm, 0)
        open_before = descriptors()
        for seed in range(1, KILLS):
            counts += beside_a_producer(context, reader, shm, seed)
        assert (reader.arenas_open(), maps(shm), descriptors()) == (0, 0, open_before)
    check(counts)
    left = len(list(shm.iterdir()))
    assert KILLS // 2 < left <= KILLS, "most had an arena when they were killed"
    assert remove_orphans(shm) == left
    assert list(shm.iterdir()) == []


def beside_a_consumer(context: ForkServerContext, arena: SharedMemoryArena, folder: Path, seed: int) -> Counter[bytes]:
    """Publishes to a consumer that is killed, and takes back what it no longer reads."""
    (here, there), (results, reports) = context.Pipe(), context.Pipe()
    process = context.Process(target=consume, args=(str(folder), there, reports, seed))
    counts: Counter[bytes] = Counter()
    with contextlib.closing(here), contextlib.closing(results):
        with killed_at_the_end(process, there, reports):
            producer = Producer(arena, here)
            started = results.poll(random.uniform(*LIVES_S) / 4)
            until = time.monotonic() + random.uniform(*LIVES_S) * (1 + started)
            while time.monotonic() < until:
                producer.step()
                while results.poll():
                    counts[results.recv_bytes()] += 1
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                counts[results.recv_bytes()] += 1
    return counts


def test_100_consumers_are_killed(shm: Path, context: ForkServerContext) -> None:
    random.seed(4)
    counts: Counter[bytes] = Counter()
    with SharedMemoryArena(shm, 1 << 20, "setting") as arena:
        beside_a_consumer(context, arena, shm, 0)
        open_before = descriptors()
        for seed in range(1, KILLS):
            counts += beside_a_consumer(context, arena, shm, seed)
        assert descriptors() == open_before
        assert remove_orphans(shm) == 0, "the producer lives"
        time.sleep(2 * LEASE_S)
        statistics = arena.statistics()
        assert statistics.free == arena.layout.slot_count, "a slot was lost"
        assert statistics.acquired_total == statistics.released_total + statistics.expired_total
        assert statistics.expired_total > KILLS / 2, "the killed took leases with them"
    check(counts)
    assert list(shm.iterdir()) == []


def check(counts: Counter[bytes]) -> None:
    print({name.decode(): count for name, count in counts.items()})  # noqa: T201
    assert counts[TORN] == 0
    assert counts[ACCEPTED] > KILLS
    assert counts[REFUSED] > 0
    # What shows that the test would see a torn tensor.
    assert counts[WOULD_TEAR] > 100
