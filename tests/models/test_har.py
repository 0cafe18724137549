"""The reference model `har`: its weights, its networks, its samples, its training."""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mosel.compute.networks import load_encoder, load_fusion
from mosel.compute.training import score
from mosel.data.samples import Samples
from mosel.errors import DatasetError
from mosel.modality import ModalitySet, format_set, subsets
from mosel.packages.model_package import ModelPackage, load_package

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models" / "har"
SETS = subsets(["acc", "gyro", "motion"])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def package() -> ModelPackage:
    return load_package(FOLDER)


@pytest.fixture(scope="module")
def samples_module(package: ModelPackage) -> ModuleType:
    return package.load_module("samples")


@pytest.fixture(scope="module")
def encoders(package: ModelPackage) -> dict[str, nn.Module]:
    return {modality: load_encoder(package, modality, CPU) for modality in package.modalities}


@pytest.fixture(scope="module")
def fusion(package: ModelPackage) -> nn.Module:
    return load_fusion(package, CPU)


@pytest.fixture(scope="module")
def payloads(package: ModelPackage) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(33, *spec.shape) for name, spec in package.modalities.items()}


@pytest.fixture(scope="module")
def data() -> Path:
    """The folder with the real recordings; tests that need them are skipped without."""
    if root := os.environ.get("MOSEL_DATA"):
        for folder in (Path(root) / "hapt", Path(root)):
            if (folder / "hapt.npz").is_file():
                return folder
    pytest.skip("MOSEL_DATA names no folder with the recordings of har")


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty people, one recording each: six activities of 300 samples, each with a level and a swing of its own."""
    folder, random = tmp_path_factory.mktemp("made_up"), np.random.default_rng(0)
    label = np.tile(np.repeat(np.arange(1, 7, dtype=np.int8), 300), 30)
    person = np.repeat(np.arange(30, dtype=np.uint8), 1800)
    signal = random.normal(size=(len(label), 3)) * label[:, None] * 50 + label[:, None] * 100
    arrays: dict[str, NDArray[Any]] = {"acc": signal.astype(np.int16), "gyro": (signal * 10).astype(np.int16)}
    arrays |= {"label": label, "user": person + 1, "experiment": person}
    np.savez(folder / "hapt.npz", **arrays)  # type: ignore[arg-type]
    return folder


@torch.inference_mode()
def predict(
    encoders: dict[str, nn.Module], fusion: nn.Module, payloads: dict[str, Tensor], chosen: ModalitySet
) -> Tensor:
    output: Tensor = fusion({modality: encoders[modality](payloads[modality]) for modality in chosen})
    return output


def test_accuracies_belong_to_the_weights(package: ModelPackage) -> None:
    document = json.loads((FOLDER / "accuracy.json").read_text())
    assert document["content_hash"] == package.content_hash
    assert set(package.accuracy.sets) == set(SETS)
    assert (package.accuracy.samples, document["test"]["samples"]) == (7_143, 2_874)
    assert package.weights.stat().st_size < 2_000_000


def test_calibration_rows_are_of_everybody_who_is_no_test_person(
    package: ModelPackage, samples_module: ModuleType
) -> None:
    calibration = package.calibration
    assert calibration is not None
    assert list(calibration.group_names) == ["person"]
    person = calibration.groups[:, 0]
    assert set(person.tolist()) == set(range(1, 31)) - set(samples_module.TEST_PEOPLE)
    choosing, certifying = (set(person[rows].tolist()) for rows in (~calibration.certify, calibration.certify))
    assert (len(choosing), len(certifying), choosing & certifying) == (4, 17, set())
    right = (calibration.answers == calibration.labels[:, None]).mean(0)
    assert dict(zip(calibration.sets, right, strict=True)) == pytest.approx(package.accuracy.sets)


def test_nobody_is_answered_by_networks_that_have_seen_them(
    made_up: Path, package: ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, everybody = package.load_module("train"), package.load_module("samples").load(made_up, "train")
    seen: list[set[int]] = []

    def fit(encoders: nn.ModuleDict, fusion: nn.Module, samples: Samples, *rest: object) -> None:
        seen.append(set(samples.groups["person"].tolist()))

    monkeypatch.setattr(train, "fit", fit)
    scores = train.cross_fitted(everybody, train.Settings(epochs=1), 3)
    people = set(everybody.groups["person"].tolist())
    assert [len(others) for others in seen] == [14, 14, 14]
    # Each fold is what the others leave out, and the folds are everybody, once.
    assert sorted(person for others in seen for person in people - others) == sorted(people)
    assert np.isfinite(scores.confidence).all()
    assert len(scores.answers) == len(everybody)


def test_accuracies_reach_what_is_promised() -> None:
    least = {"motion": 0.65, "gyro": 0.62, "gyro+motion": 0.85, "acc": 0.905, "acc+motion": 0.905}
    measured = json.loads((FOLDER / "accuracy.json").read_text())["test"]["sets"]
    assert {name: value for name, value in measured.items() if value < least.get(name, 0.93)} == {}


def test_several_sets_are_worth_choosing(package: ModelPackage) -> None:
    by_cost = [frozenset(name.split("+")) for name in ("motion", "gyro", "gyro+motion", "acc", "acc+gyro")]
    floors = (0.60, 0.85, 0.93, 0.95)
    accuracy = package.accuracy.sets
    chosen = [next(candidate for candidate in by_cost if accuracy[candidate] >= floor) for floor in floors]
    assert len(set(chosen)) >= 3


def test_labels_are_those_of_the_samples(package: ModelPackage, samples_module: ModuleType) -> None:
    assert package.output.labels == samples_module.LABELS


@pytest.mark.parametrize("chosen", SETS, ids=format_set)
def test_every_modality_set_gives_probabilities(
    encoders: dict[str, nn.Module], fusion: nn.Module, payloads: dict[str, Tensor], chosen: ModalitySet
) -> None:
    output = predict(encoders, fusion, payloads, chosen)
    assert (output.shape, output.dtype) == ((33, 6), torch.float32)
    assert bool((output >= 0).all())
    torch.testing.assert_close(output.sum(1), torch.ones(33), atol=1e-5, rtol=0)


@pytest.mark.parametrize("chosen", SETS, ids=format_set)
def test_rows_do_not_see_each_other(
    encoders: dict[str, nn.Module], fusion: nn.Module, payloads: dict[str, Tensor], chosen: ModalitySet
) -> None:
    together = predict(encoders, fusion, payloads, chosen)
    for rows in (slice(7, 8), slice(20, 33)):
        alone = predict(encoders, fusion, {name: payload[rows] for name, payload in payloads.items()}, chosen)
        torch.testing.assert_close(alone, together[rows], atol=1e-4, rtol=0)


def test_embeddings_have_the_shape_that_is_stated(
    package: ModelPackage, encoders: dict[str, nn.Module], payloads: dict[str, Tensor]
) -> None:
    for modality, spec in package.modalities.items():
        embedding = encoders[modality](payloads[modality])
        assert (embedding.shape, embedding.dtype) == ((33, *spec.embedding), torch.float32)


def test_windows_are_cut_as_described(made_up: Path, package: ModelPackage, samples_module: ModuleType) -> None:
    splits = {split: samples_module.load(made_up, split) for split in samples_module.SPLITS}
    # Of 27 windows per person those within one run of 300 samples are kept; starts are multiples of 64.
    per_person = sum(start % 300 <= 300 - 128 for start in range(0, 1800 - 127, 64))
    people = {"train": 21, "test": 9}
    assert {split: len(samples) for split, samples in splits.items()} == {
        split: count * per_person for split, count in people.items()
    }
    for modality, spec in package.modalities.items():
        payload = splits["test"].payloads[modality]
        assert (payload.shape[1:], payload.dtype) == (spec.shape, np.float32)
    with np.load(made_up / "hapt.npz") as arrays:
        first = arrays["acc"][1800:1928] / 720  # the first window of person 2, the first of the test people
    np.testing.assert_allclose(splits["test"].payloads["acc"][0], first, rtol=1e-6)
    assert {split: len(set(samples.groups["person"].tolist())) for split, samples in splits.items()} == people
    assert not set(splits["train"].groups["person"].tolist()) & set(splits["test"].groups["person"].tolist())
    magnitude = np.linalg.norm(first[:32], axis=1)
    expected = [magnitude.mean(), magnitude.std(), magnitude.min(), magnitude.max()]
    np.testing.assert_allclose(splits["test"].payloads["motion"][0, 0], expected, rtol=1e-5)


def test_missing_data_and_unknown_splits_are_named(tmp_path: Path, made_up: Path, samples_module: ModuleType) -> None:
    with pytest.raises(DatasetError, match=r"hapt\.npz: no such file"):
        samples_module.load(tmp_path, "test")
    (tmp_path / "hapt.npz").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(DatasetError, match=r"hapt\.npz: .*expected the arrays acc, gyro"):
        samples_module.load(tmp_path, "test")
    with pytest.raises(DatasetError, match="split 'calibration': expected one of train, test; `mosel train har`"):
        samples_module.load(made_up, "calibration")


@pytest.mark.slow
def test_training_writes_a_whole_package(made_up: Path, tmp_path: Path, package: ModelPackage) -> None:
    train = package.load_module("train")
    for out in ("one", "two"):
        train.main(made_up, tmp_path / out, seed=3, epochs=2)
    written = {file.name for file in (tmp_path / "one").iterdir()}
    assert written == {"weights.safetensors", "accuracy.json", "calibration.npz", "report.json", "report.md"}
    accuracy = json.loads((tmp_path / "one" / "accuracy.json").read_text())
    same_seed = tmp_path / "two" / "weights.safetensors"
    assert accuracy["content_hash"] == load_package(FOLDER, same_seed).content_hash != package.content_hash
    assert accuracy["test"]["sets"]["acc+gyro+motion"] > 0.5


def test_turning_a_phone_leaves_the_magnitude(package: ModelPackage, payloads: dict[str, Tensor]) -> None:
    turned = package.load_module("train").turn(payloads, 0.3)
    assert not torch.allclose(turned["acc"], payloads["acc"])
    before, after = (values["acc"].norm(dim=2).sort(dim=1).values for values in (payloads, turned))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    assert turned["motion"] is payloads["motion"]


def test_measured_accuracy_is_the_one_stated(
    encoders: dict[str, nn.Module], fusion: nn.Module, data: Path, samples_module: ModuleType
) -> None:
    samples: Samples = samples_module.load(data, "test")
    stated = json.loads((FOLDER / "accuracy.json").read_text())["test"]["sets"]
    assert score(encoders, fusion, samples).accuracy == pytest.approx(stated, abs=0.015)
