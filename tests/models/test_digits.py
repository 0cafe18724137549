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
from mosel.compute.training import score
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
    rows = {"train": 150, "val": 200, "test": 600}
    # Of images and pen paths, takes, clips: each split has its own, and every digit has many.
    own = {"train": (10, 10, 3), "val": (200, 200, 20), "test": (600, 200, 20)}
    first = {"train": (0, 0, 0), "val": (10, 10, 3), "test": (210, 210, 23)}
    lengths = random.integers(1500, 3000, 410)
    offset = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    files: dict[str, dict[str, NDArray[Any]]] = {
        "images": {
            "image": random.integers(0, 256, (810, 28, 28), dtype=np.uint8),
            "pca_mean": np.full(784, 0.1, np.float32),
            "pca_components": np.linalg.qr(random.normal(size=(784, 4)))[0].T.astype(np.float32),
        },
        "speech": {
            "pcm": random.integers(-9999, 9999, offset[-1], dtype=np.int16),
            "offset": offset,
            "digit": (np.arange(410) % 10).astype(np.uint8),
            "speaker": (np.arange(410) // 10 % 2).astype(np.uint8),
        },
        "pen": {
            "points": random.integers(0, 101, (810, 8, 2), dtype=np.uint8),
            "label": (np.arange(810) % 10).astype(np.uint8),
        },
        "noise": {
            "pcm": random.integers(-9999, 9999, (43, 16000), dtype=np.int16),
            "cls": np.arange(43, dtype=np.uint8) % 2,
        },
        "pairs": {},
    }
    for split, count in rows.items():
        row, label = np.arange(count), (np.arange(count) % 10).astype(np.uint8)
        image, speech, noise = (start + row % of for start, of in zip(first[split], own[split], strict=True))
        columns: dict[str, NDArray[Any]] = {
            "image": image,
            "speech": speech,
            "pen": image,
            "noise": noise,
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
    assert (package.accuracy.samples, document["test"]["samples"]) == (6_000, 2_493)


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
    assert samples.labels.tolist() == list(range(10)) * 20
    for modality, spec in package.modalities.items():
        assert samples.payloads[modality].shape == (200, *spec.shape)
        assert samples.payloads[modality].dtype == np.float32
    with np.load(made_up / "pairs.npz") as pairs:
        takes = pairs["val_speech"].tolist()
    assert samples.groups["spoken take"].tolist() == takes


def split_recordings(recordings: Any) -> dict[str, dict[str, set[int]]]:
    """What stands behind test rows, rows that choose rules, and rows that certify, part by part."""
    test, _ = recordings.rows("test")
    calibration, certify = recordings.rows("calibration")
    tables = {
        "test": test,
        "design": {name: column[~certify] for name, column in calibration.items()},
        "certify": {name: column[certify] for name, column in calibration.items()},
    }
    parts = ("image", "speech", "pen", "noise")
    return {name: {part: set(table[part].tolist()) for part in parts} for name, table in tables.items()}


def test_test_design_and_certifying_rows_share_no_recording(made_up: Path, samples_module: ModuleType) -> None:
    recordings = samples_module.read_recordings(made_up)
    behind = split_recordings(recordings)
    for part in ("image", "speech", "pen", "noise"):
        used = [behind[name][part] for name in ("test", "design", "certify")]
        assert all(used)
        assert sum(map(len, used)) == len(set.union(*used))
    samples = samples_module.load(made_up, "calibration")
    rows, certify = recordings.rows("calibration")
    again, _ = recordings.rows("calibration")
    assert all(np.array_equal(rows[name], column) for name, column in again.items())
    assert np.array_equal(samples.certify, certify)
    # The parts of a row are of its digit, which in these recordings is the last one of their number.
    assert all(np.array_equal(rows[part] % 10, rows["label"]) for part in ("image", "pen", "speech"))
    ends = rows["speech_start"] + np.diff(recordings.speech["offset"])[rows["speech"]]
    assert rows["speech_start"].min() >= 0
    assert ends.max() <= 8_000


def test_enough_groups_certify_on_the_real_recordings(data: Path, samples_module: ModuleType) -> None:
    recordings = samples_module.read_recordings(data)
    behind = split_recordings(recordings)
    for part in ("image", "speech", "pen", "noise"):
        used = [behind[name][part] for name in ("test", "design", "certify")]
        assert sum(map(len, used)) == len(set.union(*used))
    rows, certify = recordings.rows("calibration")
    sources = samples_module.noise_sources()
    by_role = [set(sources[rows["noise"][role]].tolist()) for role in (certify, ~certify)]
    assert not by_role[0] & by_role[1]
    assert len(by_role[0]) >= 30
    for part, file in {"image": recordings.images, "pen": recordings.pen}.items():
        assert np.array_equal(file["label"][rows[part]], rows["label"])
    assert np.array_equal(recordings.speech["digit"][rows["speech"]], rows["label"])


def test_calibration_rows_are_those_of_the_accuracies(package: ModelPackage) -> None:
    calibration = package.calibration
    assert calibration is not None
    assert (len(calibration.labels), int(calibration.certify.sum())) == (6_000, 5_000)
    assert list(calibration.group_names) == ["noise clip", "spoken take", "pen path"]
    right = (calibration.answers == calibration.labels[:, None]).mean(0)
    assert dict(zip(calibration.sets, right, strict=True)) == pytest.approx(package.accuracy.sets)


def test_missing_data_and_unknown_splits_are_named(tmp_path: Path, made_up: Path, samples_module: ModuleType) -> None:
    with pytest.raises(DatasetError, match=r"images\.npz"):
        samples_module.load(tmp_path, "test")
    with pytest.raises(DatasetError, match="split is 'val', expected one of train, validation, calibration, test"):
        samples_module.load(made_up, "val")


def test_training_writes_a_whole_package(made_up: Path, tmp_path: Path, package: ModelPackage) -> None:
    train = package.load_module("train")
    for out in ("one", "two"):
        train.main(made_up, tmp_path / out, seed=3, epochs=2)
    written = {file.name for file in (tmp_path / "one").iterdir()}
    assert written == {"weights.safetensors", "accuracy.json", "calibration.npz", "report.json", "report.md"}
    accuracy = json.loads((tmp_path / "one" / "accuracy.json").read_text())
    same_seed = tmp_path / "two" / "weights.safetensors"
    assert accuracy["content_hash"] == load_package(FOLDER, same_seed).content_hash != package.content_hash
    assert accuracy["validation"]["samples"] > accuracy["test"]["samples"] > 0


@pytest.fixture(scope="module")
def first_rows(data: Path, samples_module: ModuleType) -> dict[str, NDArray[np.float32]]:
    """The first 100 rows of the test table, whatever split they are in: those that golden.npz has."""
    recordings = samples_module.read_recordings(data)
    parts = ("image", "speech", "pen", "noise", "noise_start", "speech_start", "snr_db")
    rows: dict[str, NDArray[np.float32]] = recordings.payloads({p: recordings.pairs[f"test_{p}"][:100] for p in parts})
    return rows


def test_samples_agree_with_the_golden_rows(data: Path, first_rows: dict[str, NDArray[np.float32]]) -> None:
    with np.load(data / "golden.npz") as golden:
        np.testing.assert_allclose((first_rows["pen"] + 1) * 50, golden["pen"], atol=1e-4)
        np.testing.assert_allclose(first_rows["image"], golden["image"], atol=1e-5)
        np.testing.assert_allclose(first_rows["audio"], golden["audio"] / 32767 * 4, atol=1.5 * 4 / 32767)


def test_log_mel_agrees_with_the_golden_rows(
    data: Path, package: ModelPackage, first_rows: dict[str, NDArray[np.float32]]
) -> None:
    with np.load(data / "golden.npz") as golden:
        expected = golden["logmel"].astype(np.float32)
    # Not from the golden audio: its int16 steps are heard in the quiet bands.
    logmel = package.load_attribute("networks:LogMel")()(torch.tensor(first_rows["audio"])) * 3 - 4
    np.testing.assert_allclose(logmel, expected, atol=0.03)


def test_measured_accuracy_is_the_one_stated(
    encoders: dict[str, nn.Module], fusion: nn.Module, real_test_split: Samples
) -> None:
    measured = score(encoders, fusion, real_test_split).accuracy
    stated = json.loads((FOLDER / "accuracy.json").read_text())["test"]["sets"]
    assert measured == pytest.approx(stated, abs=0.015)
