"""Rows of arenas that cannot be mapped, fetched from their producers over real connections."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.config import Settings, TransportSettings
from mosel.deadline import Deadline
from mosel.errors import DeadlineExceeded, InvalidRequest, MoselError, ReadNotProven
from mosel.runtime.channels import open_blocking_channel
from mosel.runtime.service import Context, Service
from mosel.status import error_from_rpc
from mosel.transport import Reader, SharedMemoryArena, slice_rows
from mosel.transport.host import host_identity
from mosel.transport.layout import MIB
from mosel.transport.preflight import preflight
from mosel.transport.servicer import ProducerServicer
from mosel.transport.shared_memory import PIECE_BYTES
from mosel.v1 import arena_pb2, arena_pb2_grpc, tensor_pb2
from tests.mosel.transport.support import ITEM, SETTING, publish, publisher, tensor

Slices = Sequence[tensor_pb2.RowSlice]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(run_dir=tmp_path, transport=TransportSettings(max_message_mib=1))


@pytest.fixture
def large(shm: Path) -> Iterator[SharedMemoryArena]:
    with SharedMemoryArena(shm, 16 * MIB, SETTING) as arena:
        yield arena


@asynccontextmanager
async def serving(
    settings: Settings, servicer: arena_pb2_grpc.ProducerServicer, address: str = "127.0.0.1:0"
) -> AsyncIterator[str]:
    register = partial(arena_pb2_grpc.add_ProducerServicer_to_server, servicer)
    async with Service(settings, address, SETTING, register) as service:
        yield service.address


@pytest.fixture(autouse=True)
def known_host() -> None:
    """Read once, and not in a loop."""
    host_identity()


def described(arena: SharedMemoryArena, address: str) -> arena_pb2.ArenaDescription:
    description = arena.announcement().arena
    description.rung, description.address = tensor_pb2.FETCH, address
    return description


class Consumer:
    """A reader that can map nothing, in a thread, as services have it."""

    def __init__(self, settings: Settings, nothing: Path) -> None:
        self.reader = Reader(nothing, partial(open_blocking_channel, settings))

    async def open(self, arena: arena_pb2.ArenaDescription) -> bytes:
        return await asyncio.to_thread(self.reader.open, arena)

    async def gather(self, slices: Slices, dtype: str = "FP32", seconds: float = 60.0) -> NDArray[np.generic]:
        return await asyncio.to_thread(self.reader.gather, slices, dtype, ITEM, Deadline.after(seconds))


@pytest.fixture
def consumer(settings: Settings, tmp_path: Path) -> Iterator[Consumer]:
    made = Consumer(settings, tmp_path)
    with made.reader:
        yield made


async def test_what_is_fetched_is_what_was_published(
    settings: Settings, large: SharedMemoryArena, consumer: Consumer
) -> None:
    """Larger than a message may be, in several slices, and in order among inline ones."""
    array = np.random.default_rng(0).random((60_000, *ITEM), np.float32)
    assert array.nbytes > 3 * MIB
    ref, small = publish(publisher(large), "FP32", array), publish(publisher(large, "inline"), "FP32", array[:2])
    async with serving(settings, ProducerServicer(large)) as address:
        assert await consumer.open(described(large, address)) == large.announcement().nonce
        parts = [slice_rows(ref, 30_000, 30_000), slice_rows(small, 0, 2), slice_rows(ref, 7, 0), slice_rows(ref, 5, 9)]
        batch = await consumer.gather(parts)
    assert np.array_equal(batch, np.concatenate([array[30_000:], array[:2], array[5:14]]))
    fetched = batch.nbytes - array[:2].nbytes
    assert consumer.reader.statistics() == {"arenas_open": 1, "bytes_fetched": fetched}
    assert consumer.reader.bytes_read == batch.nbytes


async def test_what_the_producer_does_not_prove_is_not_read(
    settings: Settings, arena: SharedMemoryArena, consumer: Consumer
) -> None:
    made, array = publisher(arena), tensor("FP32", 4)
    async with serving(settings, ProducerServicer(arena)) as address:
        released, expired = publish(made, "FP32", array), publish(made, "FP32", array, lease_s=0.0)
        sound = slice_rows(publish(made, "FP32", array), 0, 4)
        with pytest.raises(ReadNotProven, match="not open"):
            await consumer.gather([sound])
        await consumer.open(described(arena, address))
        made.release([released.slot])
        other_size = slice_rows(publish(made, "FP32", tensor("FP32", 5)), 0, 4)
        other_size.ref.nbytes, other_size.ref.shape[0] = array.nbytes, 4
        for worthless in (slice_rows(released, 0, 4), slice_rows(expired, 0, 4), other_size):
            with pytest.raises(ReadNotProven, match=r"before it was read|another size"):
                await consumer.gather([sound, worthless])
        assert np.array_equal(await consumer.gather([sound]), array)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"begin": 1, "end": 0}, InvalidRequest),
        ({"end": 241}, InvalidRequest),
        ({"begin": 2**63, "end": 2**63 + 1}, InvalidRequest),
        ({"nbytes": 2**62, "end": 2**62}, ReadNotProven),
        ({"slot": 2**31}, ReadNotProven),
        ({"generation": 0}, ReadNotProven),
        ({"generation": 2**64 - 1}, ReadNotProven),
    ],
)
async def test_numbers_from_a_peer_are_checked(
    settings: Settings, arena: SharedMemoryArena, change: dict[str, int], kind: type[MoselError]
) -> None:
    slot = publish(publisher(arena), "FP32", tensor("FP32", 4)).slot
    sound = {"slot": slot.slot, "generation": slot.generation, "nbytes": 240, "begin": 0, "end": 240}
    name = {"arena_id": arena.arena_id, "epoch": arena.epoch}
    async with (
        serving(settings, ProducerServicer(arena)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        fetch = arena_pb2_grpc.ProducerStub(channel).Fetch
        for numbers, expected in ((sound, None), (sound | change, kind)):
            request = arena_pb2.FetchRequest(ranges=[arena_pb2.SlotRange(**numbers)], **name)
            try:
                assert sum([len(reply.data) async for reply in fetch(request)]) == 240
                raised = None
            except grpc.RpcError as error:
                raised = type(error_from_rpc(error, "producer"))
            assert raised is expected
        request = arena_pb2.FetchRequest(ranges=[arena_pb2.SlotRange(**sound)], **(name | {"epoch": 1}))
        with pytest.raises(grpc.aio.AioRpcError, match="the arena is not there"):
            _ = [reply async for reply in fetch(request)]


class Scripted(arena_pb2_grpc.ProducerServicer):
    """Shows the right nonce, and sends what a test tells it to."""

    def __init__(self, nonce: bytes, *pieces: bytes) -> None:
        self.nonce, self.pieces, self.asked = nonce, pieces, asyncio.Event()
        self.ends = asyncio.Event()

    async def Fetch(  # type: ignore[override] # noqa: N802 (named by the proto)
        self, request: arena_pb2.FetchRequest, context: Context
    ) -> None:
        for piece in self.pieces if request.ranges else [self.nonce]:
            await context.write(arena_pb2.FetchReply(data=piece))
        if request.ranges:
            self.asked.set()
            await self.ends.wait()


async def test_pieces_of_any_size_are_put_together_and_none_may_miss_or_be_too_many(
    settings: Settings, arena: SharedMemoryArena, consumer: Consumer
) -> None:
    array = tensor("FP32", 4)
    ref, data, nonce = publish(publisher(arena), "FP32", array), array.tobytes(), arena.announcement().nonce
    for pieces, message in [
        ((data[:7], data[7:100], data[100:]), None),
        ((data[:-1],), "fewer"),
        ((data[:9], b"", data[9:]), "fewer"),
        ((), "fewer"),
        ((data, b"x"), "more"),
        ((data + b"x",), "more"),
    ]:
        servicer = Scripted(nonce, *pieces)
        servicer.ends.set()
        async with serving(settings, servicer) as address:
            await consumer.open(described(arena, address))
            parts = [slice_rows(ref, 0, 1), slice_rows(ref, 1, 3)]
            if message is None:
                assert np.array_equal(await consumer.gather(parts), array)
                continue
            with pytest.raises(ReadNotProven, match=message):
                await consumer.gather(parts)


async def test_a_producer_that_hangs_ends_the_read_at_its_deadline(
    settings: Settings, arena: SharedMemoryArena, consumer: Consumer
) -> None:
    array = tensor("FP32", 4)
    ref, servicer = publish(publisher(arena), "FP32", array), Scripted(arena.announcement().nonce, b"half of it")
    async with serving(settings, servicer) as address:
        await consumer.open(described(arena, address))
        with pytest.raises(DeadlineExceeded):
            await consumer.gather([slice_rows(ref, 0, 4)], seconds=0.3)
        with pytest.raises(DeadlineExceeded, match="before fetching"):
            await consumer.gather([slice_rows(ref, 0, 4)], seconds=-1)


async def test_a_read_ends_when_its_arena_is_closed_or_its_producer_is_gone(
    settings: Settings, arena: SharedMemoryArena, consumer: Consumer
) -> None:
    part = slice_rows(publish(publisher(arena), "FP32", tensor("FP32", 4)), 0, 4)
    servicer = Scripted(arena.announcement().nonce)
    async with serving(settings, servicer) as address:
        await consumer.open(described(arena, address))
        reading = asyncio.create_task(consumer.gather([part]))
        await servicer.asked.wait()
        await asyncio.to_thread(consumer.reader.close, arena.arena_id, arena.epoch)
        with pytest.raises(ReadNotProven, match="closed while it was read"):
            await reading
        assert consumer.reader.arenas_open() == 0
        await consumer.open(described(arena, address))
        servicer.ends.set()
    with pytest.raises(ReadNotProven, match=r"^service that holds the tensor is not reachable$"):
        await consumer.gather([part])


async def test_preflight_says_why_nothing_can_be_fetched(
    settings: Settings, arena: SharedMemoryArena, large: SharedMemoryArena, consumer: Consumer, tmp_path: Path
) -> None:
    async def report(reader: Reader, address: str, arena: SharedMemoryArena = arena) -> arena_pb2.PreflightReport:
        request = arena_pb2.OpenArenaRequest(arena=described(arena, address))
        return await asyncio.to_thread(preflight, reader, request)

    with Reader(tmp_path) as reader:
        assert (await report(reader, "127.0.0.1:9")).reason == "this consumer does not fetch"
    assert "not reachable" in (await report(consumer.reader, f"unix:{tmp_path}/nobody.sock")).reason
    assert "internal_tls" in (await report(consumer.reader, "192.0.2.1:9")).reason
    async with serving(settings, ProducerServicer(arena)) as address:
        opened = await report(consumer.reader, address)
        assert (opened.nonce, opened.reason) == (arena.announcement().nonce, "")
        assert (await report(consumer.reader, address, large)).reason == "the arena is not there"
    assert consumer.reader.arenas_open() == 1


async def test_an_address_is_one_producer_s(
    settings: Settings, arena: SharedMemoryArena, large: SharedMemoryArena, consumer: Consumer
) -> None:
    address = "127.0.0.1:0"
    for producer in (arena, large):
        async with serving(settings, ProducerServicer(producer), address) as address:
            for _ in range(2):
                await consumer.open(described(producer, address))
            part = slice_rows(publish(publisher(producer), "FP32", tensor("FP32", 4)), 0, 4)
            assert np.array_equal(await consumer.gather([part]), tensor("FP32", 4))
        assert consumer.reader.arenas_open() == 1


def test_a_piece_is_proven_after_it_was_copied(arena: SharedMemoryArena) -> None:
    made, array = publisher(arena), np.zeros(2 * PIECE_BYTES // 8, np.uint8)
    slot = publish(made, "UINT8", array).slot
    wanted = arena_pb2.SlotRange(
        slot=slot.slot, generation=slot.generation, nbytes=array.nbytes, begin=0, end=array.nbytes
    )
    pieces = arena.pieces(wanted)
    made.release([slot])
    with pytest.raises(ReadNotProven):
        next(pieces)
