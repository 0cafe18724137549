"""The fusion network, fed with embedding rows."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fusion.predictor import Predictor, answers_of
from mosel.compute import networks
from mosel.errors import InternalError, InvalidRequest, ModelNotFound, PackageError
from mosel.packages.model_package import ModelPackage
from mosel.tensors import from_proto, to_proto
from mosel.transport import Reader, slice_rows
from mosel.transport.torch_exchange import TensorReader
from mosel.v1 import tensor_pb2
from tests.fruit_on_disk import Fruit, measured

CPU = torch.device("cpu")
Embeddings = dict[str, NDArray[np.float32]]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[TensorReader]:
    with Reader(tmp_path) as host, TensorReader(host, tmp_path, CPU, None) as reader:
        yield reader


@pytest.fixture
def predictor(fruit: ModelPackage, reader: TensorReader) -> Predictor:
    predictor = Predictor(CPU, reader)
    predictor.networks.load(fruit)
    return predictor


@pytest.fixture
def fused(fruit: ModelPackage) -> Callable[[Embeddings], NDArray[np.float32]]:
    network = networks.load_fusion(fruit, CPU)

    def fuse(embeddings: Embeddings) -> NDArray[np.float32]:
        output: NDArray[np.float32] = network({m: torch.from_numpy(e) for m, e in embeddings.items()}).numpy()
        return output

    return fuse


def embeddings_of(rows: int, *modalities: str) -> Embeddings:
    rng = np.random.default_rng(rows)
    return {name: rng.normal(0, 1, (rows, 8)).astype(np.float32) for name in modalities}


def group_of(embeddings: Embeddings) -> dict[str, list[tensor_pb2.RowSlice]]:
    """As the selector sends them; every modality in two parts."""
    group = {}
    for name, array in embeddings.items():
        ref = tensor_pb2.TensorRef(
            dtype=tensor_pb2.FP32, shape=array.shape, nbytes=array.nbytes, inline=array.tobytes()
        )
        group[name] = [slice_rows(ref, 0, 1), slice_rows(ref, 1, len(array) - 1)]
    return group


def test_groups_with_different_sets_keep_their_places(
    predictor: Predictor, fruit: ModelPackage, fused: Callable[[Embeddings], NDArray[np.float32]]
) -> None:
    groups = [
        embeddings_of(2, "photo"),
        embeddings_of(3, "photo", "scent"),
        embeddings_of(4, "scent"),
        embeddings_of(5, "photo"),
    ]
    outputs, seconds = predictor.fuse(fruit.id, [group_of(group) for group in groups])
    assert seconds > 0
    for output, group in zip(outputs, groups, strict=True):
        np.testing.assert_allclose(from_proto(output, "output").astype(np.float32), fused(group), atol=1e-5)
    assert predictor.counters["items"] == 14
    assert predictor.counters["calls"] == 1
    assert predictor.counters["embedding_bytes_read"] == (2 + 3 + 3 + 4 + 5) * 8 * 4


def test_groups_that_make_no_sense_are_refused(predictor: Predictor, fruit: ModelPackage) -> None:
    with pytest.raises(InvalidRequest, match=r"a group has modalities \[\]; expected some of \['photo', 'scent'\]"):
        predictor.fuse(fruit.id, [{}])
    with pytest.raises(InvalidRequest, match=r"a group has modalities \['taste'\]"):
        predictor.fuse(fruit.id, [group_of(embeddings_of(2, "taste"))])
    uneven = group_of(embeddings_of(2, "photo")) | group_of(embeddings_of(3, "scent"))
    with pytest.raises(InvalidRequest, match=r"a group has rows .*; expected as many for every modality"):
        predictor.fuse(fruit.id, [uneven])
    with pytest.raises(ModelNotFound, match="model 'tree' is not loaded in fusion"):
        predictor.fuse("tree", [group_of(embeddings_of(2, "photo"))])
    assert predictor.counters == {}


@pytest.mark.parametrize("modality_set", ["photo", "scent", "photo+scent"])
def test_every_set_can_be_timed(predictor: Predictor, fruit: ModelPackage, modality_set: str) -> None:
    assert predictor.ready_call(fruit.id, modality_set, 4)().shape == (4, 3)
    assert predictor.counters == {}


def test_sets_of_another_model_cannot(predictor: Predictor, fruit: ModelPackage) -> None:
    with pytest.raises(InvalidRequest, match=r"modality_set is 'taste'; expected a subset of photo\+scent"):
        predictor.ready_call(fruit.id, "taste", 4)


def test_an_output_that_is_not_as_described_is_refused(fruit: ModelPackage, reader: TensorReader) -> None:
    wrong = replace(fruit, output=replace(fruit.output, shape=(4,)))
    predictor = Predictor(CPU, reader)
    with pytest.raises(PackageError, match=r"networks:Fusion with photo returned \[1, 3\]; expected \[1, 4\]"):
        predictor.networks.load(wrong)
    assert predictor.networks.models == []
    predictor.networks.load(fruit)
    loaded = predictor.networks._loaded
    loaded[fruit.id] = replace(loaded[fruit.id], package=wrong)
    with pytest.raises(PackageError, match=r"networks:Fusion with scent returned \[2, 3\]; expected \[2, 4\]"):
        predictor.fuse(fruit.id, [group_of(embeddings_of(2, "scent"))])


LAST = ".softmax(-1)\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (".log().log()", r"Fusion with photo returned numbers that are not finite on example rows"),
        (
            ".softmax(0)",
            r"Fusion with photo returns other numbers for a row alone than in a batch: .* is 0\.",
        ),
        (" * torch.rand(1)", r"Fusion with photo returns other numbers"),
    ],
)
def test_what_cannot_be_answered_with_is_found_by_loading(
    changing: Fruit, reader: TensorReader, code: str, message: str
) -> None:
    changing.edit("networks.py", LAST, f".softmax(-1){code}\n")
    changing.edit("networks.py", "from torch import Tensor, nn", "import torch\nfrom torch import Tensor, nn")
    predictor = Predictor(CPU, reader)
    with pytest.raises(PackageError, match=rf"model\.toml: fusion of model 'fruit': networks:{message}"):
        predictor.networks.load(measured(changing.folder))


def test_an_output_that_is_not_finite_ends_the_call(predictor: Predictor, fruit: ModelPackage) -> None:
    bad = {"scent": np.full((2, 8), 3e38, np.float32)}
    with pytest.raises(InternalError, match=r"^fusion of model 'fruit': networks:Fusion with scent .* not finite$"):
        predictor.fuse(fruit.id, [group_of(embeddings_of(2, "scent")), group_of(bad)])


def test_an_output_that_its_type_cannot_hold_ends_the_call(changing: Fruit, reader: TensorReader) -> None:
    changing.edit("networks.py", LAST, ".softmax(-1) * 1e6\n")
    changing.edit("model.toml", 'dtype = "FP32"\nshape = [3]', 'dtype = "FP16"\nshape = [3]')
    predictor, package = Predictor(CPU, reader), measured(changing.folder)
    predictor.networks.load(package)
    with pytest.raises(InternalError, match="not finite"), np.errstate(over="ignore"):
        predictor.fuse(package.id, [group_of(embeddings_of(2, "scent"))])


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_answers_are_the_largest_output_over_all_dimensions(dtype: type[np.generic]) -> None:
    flat, square = np.array([[3, 9, 1], [4, 2, 4]]), np.array([[[1, 2], [7, 5]]])
    empty = np.zeros((0, 2, 2))
    outputs = [to_proto(array.astype(dtype)) for array in (flat, square, empty)]
    found = [(list(answers.labels), list(answers.confidences)) for answers in answers_of(outputs)]
    assert found == [([1, 0], [9.0, 4.0]), ([2], [7.0]), ([], [])]
