"""The model `tvlt`: the shape of a published model with random weights, at three scales."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mosel.compute.networks import example_payload, load_encoder, load_fusion
from mosel.errors import PackageError
from mosel.modality import ModalitySet, format_set, subsets
from mosel.packages.model_package import ModelPackage, find_packages, load_package

MODELS = Path(__file__).resolve().parents[2] / "models"
CPU = torch.device("cpu")
SETS = subsets(["audio", "video"])
ROWS = 3


@pytest.fixture(scope="module")
def package() -> ModelPackage:
    return load_package(MODELS / "tvlt")


@pytest.fixture(scope="module")
def payloads(package: ModelPackage) -> dict[str, Tensor]:
    return {modality: torch.from_numpy(example_payload(package, modality, ROWS)) for modality in package.modalities}


def networks(package: ModelPackage) -> tuple[dict[str, nn.Module], nn.Module]:
    return {m: load_encoder(package, m, CPU) for m in package.modalities}, load_fusion(package, CPU)


def predict(package: ModelPackage, payloads: dict[str, Tensor], chosen: ModalitySet) -> Tensor:
    encoders, fusion = networks(package)
    output: Tensor = fusion({modality: encoders[modality](payloads[modality]) for modality in chosen})
    return output


def geometry(package: ModelPackage, scale: float) -> Any:
    return package.load_attribute("geometry:Geometry")(scale)


def test_it_is_served_only_where_it_is_named() -> None:
    assert "tvlt" not in find_packages(MODELS)
    assert list(find_packages(MODELS, ("tvlt",))) == ["tvlt"]


def test_everything_that_a_caller_sees_says_that_the_weights_are_random(package: ModelPackage) -> None:
    assert package.random_weights
    assert "RANDOM WEIGHTS" in package.description
    assert all("random weights" in label for label in package.output.labels)
    assert not list(package.folder.glob("*.safetensors"))


def test_accuracies_are_the_published_ones_and_say_so(package: ModelPackage) -> None:
    accuracy = package.accuracy
    assert {format_set(s): value for s, value in accuracy.sets.items()} == {
        "audio": 0.7233,
        "video": 0.66,
        "audio+video": 0.7432,
    }
    assert accuracy.samples == 0
    assert "not measured here" in accuracy.source


@pytest.mark.parametrize("chosen", SETS, ids=format_set)
def test_two_loads_give_the_same_answers(
    package: ModelPackage, payloads: dict[str, Tensor], chosen: ModalitySet
) -> None:
    first = predict(package, payloads, chosen)
    torch.manual_seed(1)
    torch.testing.assert_close(predict(load_package(package.folder), payloads, chosen), first, atol=0, rtol=0)
    assert (first.shape, first.dtype) == ((ROWS, 2), torch.float32)
    torch.testing.assert_close(first.sum(1), torch.ones(ROWS))
    assert len({tuple(row) for row in first.tolist()}) == ROWS, "different items, different answers"


@pytest.mark.parametrize("chosen", SETS, ids=format_set)
def test_rows_do_not_see_each_other(package: ModelPackage, payloads: dict[str, Tensor], chosen: ModalitySet) -> None:
    together = predict(package, payloads, chosen)
    alone = predict(package, {modality: payload[1:2] for modality, payload in payloads.items()}, chosen)
    torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=0)


def test_a_byte_changes_its_own_token_and_no_other(package: ModelPackage, payloads: dict[str, Tensor]) -> None:
    encoders, _ = networks(package)
    tokens = {"audio": 3 * 32 + 31, "video": 7 * 49 + 48}  # the last byte is in the last patch of the grid
    for modality, encoder in encoders.items():
        changed = payloads[modality].clone()
        changed[0].view(-1)[-1] ^= 255
        different = (encoder(changed) != encoder(payloads[modality])).any(-1)
        assert different.nonzero().tolist() == [[0, tokens[modality]]]


@pytest.mark.parametrize(("value", "rows"), [(0, 1), (255, 2)])
def test_extreme_payloads_give_finite_answers(package: ModelPackage, value: int, rows: int) -> None:
    payloads = {m: torch.full((rows, *spec.shape), value, dtype=torch.uint8) for m, spec in package.modalities.items()}
    assert bool(predict(package, payloads, frozenset(payloads)).isfinite().all())


def test_embeddings_have_the_shape_that_is_stated(package: ModelPackage, payloads: dict[str, Tensor]) -> None:
    for modality, encoder in networks(package)[0].items():
        embedding = encoder(payloads[modality])
        assert (embedding.shape, embedding.dtype) == ((ROWS, *package.modalities[modality].embedding), torch.float32)


def test_at_scale_1_it_has_the_published_size(package: ModelPackage) -> None:
    full = geometry(package, 1)
    assert (full.width, full.depth, full.heads, full.patch) == (768, 12, 12, (16, 16))
    assert full.tokens == {"audio": 512, "video": 8 * 196}
    assert full.payloads == {"audio": (128, 1024), "video": (8, 3, 224, 224)}


@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_scale_keeps_what_the_sets_cost_beside_each_other(package: ModelPackage, scale: float) -> None:
    full, scaled = geometry(package, 1), geometry(package, scale)
    assert scaled.ratios() == pytest.approx(full.ratios(), rel=0.01)
    assert (scaled.width, scaled.depth) == (768 * scale, 12 * scale)
    assert scaled.tokens == {modality: tokens * scale for modality, tokens in full.tokens.items()}


@pytest.mark.parametrize("chosen", SETS, ids=format_set)
def test_multiplications_are_those_of_the_networks(
    package: ModelPackage, payloads: dict[str, Tensor], chosen: ModalitySet
) -> None:
    encoders, fusion = networks(package)
    # The counter knows matrix products, but not the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fusion({modality: encoders[modality](payloads[modality]) for modality in chosen})
    stated = geometry(package, package.parameters["scale"]).multiplications[chosen]
    # A multiplication and an addition are two operations; the head is not stated.
    assert counter.get_total_flops() / 2 / ROWS == pytest.approx(stated, rel=0.001)


@pytest.mark.parametrize("scale", [1, 0.5, 0.25])
def test_another_scale_is_another_package(package: ModelPackage, tmp_path: Path, scale: float) -> None:
    folder = package.load_attribute("rescale:write")(scale, tmp_path)
    written = find_packages(tmp_path, ("tvlt",))["tvlt"]
    expected = geometry(written, scale)
    assert written.parameters == {"scale": scale}
    assert {m: spec.shape for m, spec in written.modalities.items()} == expected.payloads
    assert {m: spec.embedding for m, spec in written.modalities.items()} == {
        modality: (tokens, expected.width) for modality, tokens in expected.tokens.items()
    }
    assert written.accuracy == package.accuracy
    assert (written.version == package.version) == (scale == package.parameters["scale"])
    assert folder == tmp_path / "tvlt"


def test_a_package_at_another_scale_answers(package: ModelPackage, tmp_path: Path) -> None:
    package.load_attribute("rescale:write")(0.5, tmp_path)
    written = load_package(tmp_path / "tvlt")
    payloads = {m: torch.from_numpy(example_payload(written, m, 1)) for m in written.modalities}
    for chosen in SETS:
        assert predict(written, payloads, chosen).isfinite().all()


def test_the_description_is_what_its_own_scale_gives(package: ModelPackage, tmp_path: Path) -> None:
    package.load_attribute("rescale:write")(package.parameters["scale"], tmp_path)
    texts = [(folder / "model.toml").read_text() for folder in (package.folder, tmp_path / "tvlt")]
    assert tomllib.loads(texts[0]) == tomllib.loads(texts[1])


def test_a_scale_that_does_not_divide_and_a_folder_that_is_there_are_refused(
    package: ModelPackage, tmp_path: Path
) -> None:
    write = package.load_attribute("rescale:write")
    with pytest.raises(PackageError, match=r"parameters\.scale holds 0\.3; expected one of 1, 0\.5, 0\.25"):
        write(0.3, tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(0.5, tmp_path)
    with pytest.raises(PackageError, match="tvlt is there already"):
        write(0.5, tmp_path)
