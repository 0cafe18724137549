"""Encoders that fusion calls itself: payload rows in, predictions out."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from encoders.encoder import ModalityEncoder
from fusion.predictor import Predictor
from mosel.compute.joined import JoinedEncoders
from mosel.config import TransportSettings
from mosel.errors import InternalError, ServiceUnavailable
from mosel.packages.model_package import ModelPackage
from mosel.tensors import dtype_value, from_proto
from mosel.transport import Reader, open_arenas, slice_rows
from mosel.transport.torch_exchange import TensorPublisher, TensorReader
from mosel.v1 import tensor_pb2

CPU = torch.device("cpu")
Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[[Payloads, Iterable[str]], NDArray[Any]]
Group = dict[str, list[tensor_pb2.RowSlice]]


@pytest.fixture
def joined(fruit: ModelPackage, tmp_path: Path) -> Iterator[JoinedEncoders]:
    joined = JoinedEncoders(["photo", "scent"])
    with Reader(tmp_path) as reader, open_arenas(TransportSettings(shm_dir=tmp_path), 1, "test") as publisher:
        for modality in joined.modalities:
            encoder = ModalityEncoder(modality, CPU, reader, TensorPublisher(publisher, None))
            encoder.networks.load(fruit)
            joined.join(modality, encoder)
        yield joined


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[TensorReader]:
    with Reader(tmp_path) as host, TensorReader(host, tmp_path, CPU, None) as reader:
        yield reader


@pytest.fixture
def predictor(fruit: ModelPackage, reader: TensorReader, joined: JoinedEncoders) -> Predictor:
    predictor = Predictor(CPU, reader, joined=joined)
    predictor.networks.load(fruit)
    return predictor


def group_of(fruit: ModelPackage, payloads: Payloads, modalities: Iterable[str]) -> Group:
    """As the selector sends them; every modality in two parts."""
    group: Group = {}
    for name in modalities:
        array = payloads[name]
        ref = tensor_pb2.TensorRef(
            dtype=dtype_value(fruit.modalities[name].dtype),
            shape=array.shape,
            nbytes=array.nbytes,
            inline=array.tobytes(),
        )
        group[name] = [slice_rows(ref, 0, 1), slice_rows(ref, 1, len(array) - 1)]
    return group


def test_groups_of_payloads_are_answered_as_by_the_networks(
    predictor: Predictor, fruit: ModelPackage, draw: Draw, directly: Directly
) -> None:
    sent = [(draw(3, seed=1), ("photo",)), (draw(4, seed=2), ("photo", "scent")), (draw(2, seed=3), ("photo",))]
    groups = [group_of(fruit, payloads, modalities) for payloads, modalities in sent]
    outputs, seconds = predictor.fuse(fruit.id, groups, from_payloads=True)
    assert seconds > 0
    for output, (payloads, modalities) in zip(outputs, sent, strict=True):
        answers = from_proto(output, "output").astype(np.float32)
        np.testing.assert_allclose(answers, directly(payloads, modalities), atol=1e-5)
    encoded = {m: predictor.joined.of(m).counters["items"] for m in ("photo", "scent")}  # type: ignore[attr-defined]
    assert encoded == {"photo": 9, "scent": 4}


def test_an_encoder_that_is_not_there_yet_is_said_to_be_away(
    predictor: Predictor, fruit: ModelPackage, reader: TensorReader, draw: Draw
) -> None:
    alone = Predictor(CPU, reader, joined=JoinedEncoders(["photo"]))
    alone.networks.load(fruit)
    for modality in ("photo", "scent"):
        with pytest.raises(ServiceUnavailable, match=f"encoder/{modality} is not in the process of fusion"):
            alone.fuse(fruit.id, [group_of(fruit, draw(2), [modality])], from_payloads=True)


def test_embeddings_that_are_not_finite_end_the_call(predictor: Predictor, fruit: ModelPackage, draw: Draw) -> None:
    payloads = draw(2)
    payloads["scent"][1, 0] = np.nan
    with pytest.raises(InternalError, match=r"^encoder/scent of model 'fruit': .* not finite$"):
        predictor.fuse(fruit.id, [group_of(fruit, payloads, ["photo", "scent"])], from_payloads=True)


def test_of_several_encoders_of_a_modality_the_first_is_taken(joined: JoinedEncoders) -> None:
    first = joined.of("photo")
    joined.join("photo", joined.of("scent"))
    joined.join("sound", first)
    assert joined.of("photo") is first
    with pytest.raises(ServiceUnavailable):
        joined.of("sound")
