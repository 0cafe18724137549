"""The reference model `digits`: its weights, its networks, its samples, its training."""

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
from mosel.compute.training import measure_accuracy
from mosel.data.samples import Samples
from mosel.errors import DatasetError
from mosel.modality import ModalitySet, format_set, subsets
from mosel.packages.model_package import ModelPackage, load_package

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "models" / "digits"
SETS = subsets(["audio", "image", "pen"])
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
    scale = {"audio": 0.1, "image": 0.3, "pen": 0.5}
    return {name: torch.randn(33, *spec.shape) * scale[name] for name, spec in package.modalities.items()}


@pytest.fixture(scope="module")
def data() -> Path:
    """The folder with the real recordings; tests that need them are skipped without."""
    if root := os.environ.get("MOSEL_DATA"):
        for folder in (Path(root) / "digits3", Path(root)):
            if (folder / "pairs.npz").is_file():
                return folder
    pytest.skip("MOSEL_DATA names no folder with the recordings of digits")


@pytest.fixture(scope="module")
def real_test_split(data: Path, samples_module: ModuleType) -> Samples:
    samples: Samples = samples_module.load(data, "test")
    return samples


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random recordings, in the layout of the real ones."""
    folder, random = tmp_path_factory.mktemp("made_up"), np.random.default_rng(0)
    rows = {"train": 150, "val": 20, "test": 10}
    labels = {split: np.arange(count, dtype=np.uint8) % 10 for split, count in rows.items()}
    lengths = random.integers(1500, 5000, 20)
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    files: dict[str, dict[str, NDArray[Any]]] = {
        "images": {
            "image": random.integers(0, 256, (20, 28, 28), dtype=np.uint8),
            "pca_mean": np.full(784, 0.1, np.float32),
            "pca_components": np.linalg.qr(random.normal(size=(784, 4)))[0].T.astype(np.float32),
        },
        "speech": {"pcm": random.integers(-9999, 9999, offset[-1], dtype=np.int16), "offset": offset},
        "pen": {"points": random.integers(0, 101, (20, 8, 2), dtype=np.uint8)},
        "noise": {"pcm": random.integers(-9999, 9999, (3, 16000), dtype=np.int16)},
        "pairs": {},
    }
    for split, label in labels.items():
        columns: dict[str, NDArray[Any]] = {
            "image": label,
            "speech": label,
            "pen": label,
            "noise": label % 3,
            "noise_start": np.full(len(label), 8000, np.int16),
            "speech_start": np.full(len(label), 3000, np.int16),
            "snr_db": np.full(len(label), -6, np.float32),
            "label": label,
        }
        files["pairs"] |= {f"{split}_{name}": column for name, column in columns.items()}
    for name, arrays in files.items():
        np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    return folder


def test_accuracies_belong_to_the_weights(package: ModelPackage) -> None:
    document = json.loads((FOLDER / "accuracy.json").read_text())
    assert document["content_hash"] == package.content_hash
    assert set(package.accuracy.sets) == set(SETS)
    assert package.accuracy.samples == 2_000
    assert document["test"]["samples"] == 10_000


def test_accuracies_reach_what_is_promised() -> None:
    least = {"pen": 0.60, "image": 0.64, "audio": 0.72, "audio+image": 0.88, "audio+pen": 0.88, "image+pen": 0.86}
    measured = json.loads((FOLDER / "accuracy.json").read_text())["test"]["sets"]
    assert {name: value for name, value in measured.items() if value < least.get(name, 0.95)} == {}


@torch.inference_mode()
def predict(
    encoders: dict[str, nn.Module], fusion: nn.Module, payloads: dict[str, Tensor], chosen: ModalitySet
) -> Tensor:
    output: Tensor = fusion({modality: encoders[modality](payloads[modality]) for modality in chosen})
    return output


@pytest.mark.parametrize("chosen", SETS, ids=format_set)
def test_every_modality_set_gives_probabilities(
    encoders: dict[str, nn.Module], fusion: nn.Module, payloads: dict[str, Tensor], chosen: ModalitySet
) -> None:
    output = predict(encoders, fusion, payloads, chosen)
    assert (output.shape, output.dtype) == ((33, 10), torch.float32)
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


def test_silence_and_noise_give_finite_answers(encoders: dict[str, nn.Module], fusion: nn.Module) -> None:
    for audio in (torch.zeros(2, 8000), torch.ones(2, 8000) * 1e4):
        assert bool(predict(encoders, fusion, {"audio": audio}, frozenset(["audio"])).isfinite().all())


def test_a_mix_has_the_ratio_and_loudness_asked_for(samples_module: ModuleType) -> None:
    random = np.random.default_rng(0)
    take, noise = random.normal(size=2000).astype(np.float32), random.normal(size=8000).astype(np.float32) * 5
    mixed = samples_module.mix(take, noise, start=1000, snr_db=-6.0)
    scale = np.dot(mixed[3000:], noise[3000:]) / np.dot(noise[3000:], noise[3000:])
    signal = mixed[1000:3000] - scale * noise[1000:3000]
    ratio_db = 20 * np.log10(np.sqrt(np.mean(signal**2)) / (scale * np.sqrt(np.mean(noise**2))))
    assert ratio_db == pytest.approx(-6.0, abs=0.01)
    assert np.sqrt(np.mean(mixed**2)) == pytest.approx(0.1, rel=1e-4)


def test_silent_noise_leaves_the_take(samples_module: ModuleType) -> None:
    mixed = samples_module.mix(np.ones(10, np.float32), np.zeros(8000, np.float32), start=5, snr_db=0.0)
    assert np.flatnonzero(mixed).tolist() == list(range(5, 15))


def test_samples_fit_what_the_package_states(made_up: Path, package: ModelPackage, samples_module: ModuleType) -> None:
    samples = samples_module.load(made_up, "validation")
    assert samples.labels.tolist() == list(range(10)) * 2
    for modality, spec in package.modalities.items():
        assert samples.payloads[modality].shape == (20, *spec.shape)
        assert samples.payloads[modality].dtype == np.float32
    with np.load(made_up / "pairs.npz") as pairs:
        takes = pairs["val_speech"].tolist()
    assert samples_module.recordings(made_up, "validation").tolist() == takes


def test_missing_data_and_unknown_splits_are_named(tmp_path: Path, made_up: Path, samples_module: ModuleType) -> None:
    with pytest.raises(DatasetError, match=r"images\.npz"):
        samples_module.load(tmp_path, "test")
    with pytest.raises(DatasetError, match="split is 'val', expected one of train, validation, test"):
        samples_module.load(made_up, "val")


def test_training_writes_a_whole_package(made_up: Path, tmp_path: Path, package: ModelPackage) -> None:
    train = package.load_module("train")
    for out in ("one", "two"):
        train.main(made_up, tmp_path / out, seed=3, epochs=3)
    written = {file.name for file in (tmp_path / "one").iterdir()}
    assert written == {"weights.safetensors", "accuracy.json", "report.json", "report.md"}
    accuracy = json.loads((tmp_path / "one" / "accuracy.json").read_text())
    same_seed = tmp_path / "two" / "weights.safetensors"
    assert accuracy["content_hash"] == load_package(FOLDER, same_seed).content_hash != package.content_hash
    assert (accuracy["validation"]["samples"], accuracy["test"]["samples"]) == (20, 10)


def test_samples_agree_with_the_golden_rows(data: Path, real_test_split: Samples) -> None:
    with np.load(data / "golden.npz") as golden:
        first = real_test_split.take(slice(0, 100))
        assert first.labels.tolist() == golden["label"].tolist()
        np.testing.assert_allclose((first.payloads["pen"] + 1) * 50, golden["pen"], atol=1e-4)
        np.testing.assert_allclose(first.payloads["image"], golden["image"], atol=1e-5)
        np.testing.assert_allclose(first.payloads["audio"], golden["audio"] / 32767 * 4, atol=1.5 * 4 / 32767)


def test_log_mel_agrees_with_the_golden_rows(data: Path, package: ModelPackage, real_test_split: Samples) -> None:
    with np.load(data / "golden.npz") as golden:
        expected = golden["logmel"].astype(np.float32)
    # Not from the golden audio: its int16 steps are heard in the quiet bands.
    logmel = package.load_attribute("networks:LogMel")()(torch.tensor(real_test_split.payloads["audio"][:100])) * 3 - 4
    np.testing.assert_allclose(logmel, expected, atol=0.03)


def test_measured_accuracy_is_the_one_stated(
    encoders: dict[str, nn.Module], fusion: nn.Module, real_test_split: Samples
) -> None:
    rows = np.random.default_rng(0).permutation(len(real_test_split))[:2_500]
    measured = measure_accuracy(encoders, fusion, real_test_split.take(rows))
    stated = json.loads((FOLDER / "accuracy.json").read_text())["test"]["sets"]
    assert measured == pytest.approx(stated, abs=0.015)
