"""One modality's networks, with payloads in a real arena."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from encoders.encoder import ModalityEncoder
from mosel.compute import networks
from mosel.config import TransportSettings
from mosel.errors import InternalError, InvalidRequest, ModelNotFound, PackageError
from mosel.packages.model_package import ModelPackage
from mosel.transport import ArenaKinds, Publisher, Reader, SharedMemoryArena, open_arenas, slice_rows
from mosel.transport.torch_exchange import TensorPublisher, TensorReader
from mosel.v1 import tensor_pb2
from tests.fruit_on_disk import Fruit, measured

Draw = Callable[..., dict[str, NDArray[Any]]]
CPU = torch.device("cpu")
SHM = tensor_pb2.POSIX_SHM


@pytest.fixture
def transport(tmp_path: Path) -> TransportSettings:
    return TransportSettings(shm_dir=tmp_path, inline_max_kib=0)


@pytest.fixture
def arena(transport: TransportSettings) -> Iterator[tuple[SharedMemoryArena, Publisher]]:
    with open_arenas(transport, 1, "test") as publisher:
        assert publisher.arena
        publisher.rung = SHM
        yield publisher.arena, publisher


@pytest.fixture
def reader(transport: TransportSettings, arena: tuple[SharedMemoryArena, Publisher]) -> Iterator[Reader]:
    with Reader(transport.shm_dir) as reader:
        assert reader.open(arena[0].announcement().arena) == arena[0].announcement().nonce
        yield reader


@pytest.fixture
def encoder(fruit: ModelPackage, arena: tuple[SharedMemoryArena, Publisher], reader: Reader) -> ModalityEncoder:
    encoder = ModalityEncoder("scent", CPU, reader, TensorPublisher(arena[1], None))
    encoder.networks.load(fruit)
    return encoder


def published(publisher: Publisher, array: NDArray[Any], dtype: str = "FP32") -> tensor_pb2.TensorRef:
    return publisher.publish(dtype, array.shape, array.data.cast("B"), lease_s=60)


def test_rows_of_several_payloads_are_one_batch(
    encoder: ModalityEncoder,
    fruit: ModelPackage,
    arena: tuple[SharedMemoryArena, Publisher],
    reader: Reader,
    draw: Draw,
) -> None:
    first, second = draw(5, seed=1)["scent"], draw(9, seed=2)["scent"]
    rows = [slice_rows(published(arena[1], first), 3, 2), slice_rows(published(arena[1], second), 0, 9)]
    ref, seconds = encoder.encode(fruit.id, rows, SHM, lease_s=60)
    embeddings = reader.gather([slice_rows(ref, 0, 11)], "FP32", (8,))
    network = networks.load_encoder(fruit, "scent", CPU)
    expected = network(torch.from_numpy(np.concatenate([first[3:], second]))).numpy()
    np.testing.assert_allclose(embeddings.astype(np.float32), expected, atol=1e-5)
    assert seconds > 0
    assert encoder.counters == {"calls": 1, "items": 11, "payload_bytes_read": 11 * 6 * 4}
    assert arena[0].statistics().published == 3


def test_in_one_process_nothing_is_copied_on_the_way_to_the_network_and_on_to_fusion(
    transport: TransportSettings, fruit: ModelPackage, draw: Draw
) -> None:
    here = ArenaKinds(in_process=True, shared=False)
    seen: list[torch.Tensor] = []
    with (
        open_arenas(transport, 1, "gateway", here) as payloads,
        open_arenas(transport, 1, "encoder", here) as embeddings,
        Reader(transport.shm_dir) as payload_reader,
        Reader(transport.shm_dir) as host_reader,
        TensorReader(host_reader, transport.shm_dir, CPU, None) as reader,
    ):
        publisher = TensorPublisher(embeddings, None)
        encoder = ModalityEncoder("scent", CPU, payload_reader, publisher)
        encoder.networks.load(fruit)
        for arenas, consumer in ((payloads.announcement(), payload_reader), (publisher.announcement(), reader)):
            for announced in arenas.arenas:
                assert consumer.open(announced.arena) == announced.nonce
        loaded = encoder.networks.get(fruit.id)
        assert loaded
        loaded.network.register_forward_hook(lambda _, inputs, output: seen.extend((*inputs, output)))
        payloads.rung, array = tensor_pb2.IN_PROCESS, draw(9)["scent"]
        rows = [slice_rows(published(payloads, array), 2, 5)]
        ref, _ = encoder.encode(fruit.id, rows, tensor_pb2.IN_PROCESS, lease_s=60)
        batch = reader.gather([slice_rows(ref, 0, 5)], "FP32", (8,))
        payload, made = seen
        assert np.shares_memory(payload.numpy(), array)
        assert (batch.data_ptr(), batch.shape) == (made.data_ptr(), made.shape)
        assert torch.equal(batch, networks.load_encoder(fruit, "scent", CPU)(torch.from_numpy(array[2:7])))
        assert encoder.counters["payload_bytes_read"] == 5 * 6 * 4
        publisher.release([ref.slot])
        assert publisher.statistics()["object_slots_published"] == 0
    assert list(transport.shm_dir.iterdir()) == []


def test_payloads_that_are_not_this_modality_s_are_refused(
    encoder: ModalityEncoder, fruit: ModelPackage, arena: tuple[SharedMemoryArena, Publisher], draw: Draw
) -> None:
    photo = slice_rows(published(arena[1], draw(2)["photo"], "UINT8"), 0, 2)
    with pytest.raises(InvalidRequest, match=r"ref is UINT8 \[2, 24, 24, 3\]; expected FP32 \[rows, 6\]"):
        encoder.encode(fruit.id, [photo], SHM, lease_s=60)
    beyond = slice_rows(published(arena[1], draw(2)["scent"]), 1, 2)
    with pytest.raises(InvalidRequest, match="of a tensor with 2 rows"):
        encoder.encode(fruit.id, [beyond], SHM, lease_s=60)
    assert encoder.counters == {}


def test_only_models_that_have_the_modality_are_known(
    fruit: ModelPackage, arena: tuple[SharedMemoryArena, Publisher], reader: Reader
) -> None:
    deaf = replace(fruit, name="deaf", modalities={"photo": fruit.modalities["photo"]})
    encoder = ModalityEncoder("scent", CPU, reader, TensorPublisher(arena[1], None))
    with pytest.raises(ModelNotFound, match="model 'deaf' has no modality 'scent'"):
        encoder.networks.load(deaf)
    encoder.networks.load(fruit)
    assert encoder.networks.models == [fruit.id]
    with pytest.raises(ModelNotFound, match=f"model '{deaf.id}' is not loaded in encoder/scent"):
        encoder.encode(deaf.id, [], SHM, lease_s=60)


def test_it_can_be_timed(encoder: ModalityEncoder, fruit: ModelPackage) -> None:
    assert encoder.ready_call(fruit.id, 4)().shape == (4, 8)
    # Measuring is no work for a caller.
    assert encoder.counters == {}


def test_a_network_that_contradicts_its_description_is_found_by_loading(
    fruit: ModelPackage, arena: tuple[SharedMemoryArena, Publisher], reader: Reader
) -> None:
    wrong = replace(fruit, modalities={"scent": replace(fruit.modalities["scent"], embedding=(7,))})
    encoder = ModalityEncoder("scent", CPU, reader, TensorPublisher(arena[1], None))
    with pytest.raises(PackageError, match=r"model\.toml: networks:Scent returned \[1, 8\]; expected \[1, 7\]"):
        encoder.networks.load(wrong)
    wrong = replace(fruit, modalities={"scent": replace(fruit.modalities["scent"], shape=(5,))})
    with pytest.raises(PackageError, match=r"model\.toml: networks:Scent fails on an input of the shape stated there"):
        encoder.networks.load(wrong)
    assert encoder.networks.models == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("super().forward(payload) / 0", r"returned numbers that are not finite on example rows"),
        ("super().forward(payload - payload.mean(0))", r"returns other numbers for a row alone than in a batch"),
        # What it reads may be shared with others.
        ("super().forward(payload.mul_(2))", r"returns other numbers for a row alone than in a batch"),
        ("super().forward(payload.cumsum(0))", r"returns other numbers for a row alone than in a batch"),
        ("super().forward(payload.flip(0).cumsum(0).flip(0))", r"returns other numbers for a row alone"),
    ],
)
def test_what_cannot_be_answered_with_is_found_by_loading(
    changing: Fruit, arena: tuple[SharedMemoryArena, Publisher], reader: Reader, code: str, message: str
) -> None:
    made = "super().__init__(6, 8)\n"
    changing.edit("networks.py", made, f"{made}\n    def forward(self, payload):\n        return {code}\n")
    encoder = ModalityEncoder("scent", CPU, reader, TensorPublisher(arena[1], None))
    with pytest.raises(PackageError, match=rf"encoder/scent of model 'fruit': networks:Scent {message}"):
        encoder.networks.load(measured(changing.folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_may_differ_by_what_the_precision_of_a_network_makes_of_other_sums(
    fruit: ModelPackage, dtype: torch.dtype
) -> None:
    part, precision = networks.Part(fruit, "encoder/scent", "networks:Scent", (8,)), torch.finfo(dtype).eps
    rows = torch.rand(2, 8).to(dtype)

    def call(some: slice, share: float) -> torch.Tensor:
        alone = rows[some]
        return alone * (1 + share) if len(alone) == 2 else alone

    part.check_rows_apart(lambda some: call(some, precision), precision)
    with pytest.raises(PackageError, match="returns other numbers for a row alone"):
        part.check_rows_apart(lambda some: call(some, 0.1), precision)


def test_embeddings_that_are_not_finite_end_the_call(
    encoder: ModalityEncoder, fruit: ModelPackage, arena: tuple[SharedMemoryArena, Publisher]
) -> None:
    payload = np.zeros((3, 6), np.float32)
    payload[1] = 3.4e38
    ref = published(arena[1], payload)
    with pytest.raises(InternalError, match=r"^encoder/scent of model 'fruit': networks:Scent returned .* not finite$"):
        encoder.encode(fruit.id, [slice_rows(ref, 0, 3)], SHM, 60)
    assert encoder.counters == {}
