"""`mosel calibrate`, with labels and without, on a package whose networks answer what they are told."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from mosel.cli import app
from mosel.cli.savings import savings
from mosel.compute.training import save_weights
from mosel.errors import ConfigError, DatasetError, MoselError, PackageError
from mosel.packages.calibration import UNLABELLED, Calibration, read_calibration
from mosel.packages.model_modules import forget_modules
from mosel.packages.model_package import ModelPackage, load_package

MODEL = """
name = "echo"
version = "1"

[output]
name = "probabilities"
dtype = "FP32"
shape = [4]

[modalities.near]
dtype = "FP32"
shape = [4]
encoder = "networks:Same"
embedding = [4]

[modalities.far]
dtype = "FP32"
shape = [4]
encoder = "networks:Same"
embedding = [4]

[fusion]
class = "networks:Sum"

[samples]
module = "samples"
"""

NETWORKS = """
import torch

class Same(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, payload):
        return payload * self.scale

class Sum(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, embeddings):
        return (sum(embeddings.values()) * self.scale).softmax(-1)
"""

# `near` says the label, `far` is wrong of every tenth item and less sure.
SAMPLES = """
import numpy as np
from mosel.data.samples import Samples
from mosel.errors import NoSuchSplit

def load(data, split):
    if split not in ("calibration", "test"):
        raise NoSuchSplit(split)
    labels = np.arange(400 if split == "calibration" else 40) % 4
    far = np.where(np.arange(len(labels)) % 10 == 0, (labels + 1) % 4, labels)
    one_hot = np.eye(4, dtype=np.float32)
    person = np.arange(len(labels)) // 5
    return Samples({"near": one_hot[labels] * 9, "far": one_hot[far] * 3}, labels, {"person": person})
"""


@pytest.fixture
def package(tmp_path: Path) -> ModelPackage:
    folder = tmp_path / "models" / "echo"
    folder.mkdir(parents=True)
    for name, text in {"model.toml": MODEL, "networks.py": NETWORKS, "samples.py": SAMPLES}.items():
        (folder / name).write_text(text)
    package = load_package(folder)
    encoders = {name: package.load_attribute(spec.encoder)() for name, spec in package.modalities.items()}
    save_weights(folder, encoders, package.load_attribute(package.fusion)())
    return load_package(folder)


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """A folder with 50 items of both modalities, without labels."""
    folder = tmp_path / "items"
    folder.mkdir()
    one_hot = np.eye(4, dtype=np.float32)
    for modality in ("near", "far"):
        np.save(folder / f"{modality}.npy", one_hot[np.arange(50) % 4] * 5)
    np.save(folder / "groups.npy", (np.arange(50) // 2).astype(np.int32))
    return folder


def calibrate(package: ModelPackage, *arguments: str | Path) -> Result:
    """The command, whose errors are raised; modules are imported again, as in a process of its own."""
    forget_modules(package.name)
    models = ("--models", str(package.folder.parent), "--device", "cpu")
    result = CliRunner().invoke(app, ["calibrate", package.name, *map(str, arguments), *models])
    if isinstance(result.exception, MoselError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_accuracies_and_rows_are_measured_with_labels(package: ModelPackage, tmp_path: Path) -> None:
    output = calibrate(package, "--data", tmp_path).output
    measured = load_package(package.folder)
    assert measured.accuracy.sets == pytest.approx(
        {frozenset(["near"]): 1.0, frozenset(["far"]): 0.9, frozenset(["far", "near"]): 1.0}
    )
    document = json.loads((package.folder / "accuracy.json").read_text())
    assert (document["validation"]["samples"], document["test"]["samples"]) == (400, 40)
    calibration = measured.calibration
    assert calibration is not None
    assert calibration.content_hash == package.content_hash
    assert calibration.is_labelled
    assert (len(calibration.labels), list(calibration.group_names)) == (400, ["person"])
    assert "400 rows: 80 choose rules, 320 certify them" in output
    assert "64 by person" in output
    assert "at least" in output


def test_another_measurement_replaces_one_of_other_files(package: ModelPackage, tmp_path: Path) -> None:
    calibrate(package, "--data", tmp_path)
    (package.folder / "samples.py").write_text(SAMPLES.replace("% 10", "% 5"))
    changed = load_package(package.folder)
    with pytest.raises(PackageError, match="key 'content_hash' holds"):
        _ = changed.accuracy
    calibrate(package, "--data", tmp_path)
    assert load_package(package.folder).accuracy.sets[frozenset(["far"])] == pytest.approx(0.8)


def test_rows_without_labels_leave_accuracies_alone(package: ModelPackage, items: Path) -> None:
    output = calibrate(package, "--unlabelled", items).output
    assert not package.accuracy_file.exists()
    calibration = load_package(package.folder).calibration
    assert calibration is not None
    assert set(calibration.labels.tolist()) == {UNLABELLED}
    assert calibration.groups[:, 0].tolist() == (np.arange(50) // 2).tolist()
    assert "50 rows: 10 choose rules, 40 certify them" in output
    assert "1 points" in output


def test_labelled_rows_are_not_lost_by_accident(package: ModelPackage, items: Path, tmp_path: Path) -> None:
    calibrate(package, "--data", tmp_path)
    before = package.accuracy_file.read_bytes()
    with pytest.raises(ConfigError, match="has labelled rows, which would be lost; --replace gives them up"):
        calibrate(package, "--unlabelled", items)
    assert read_calibration(package.folder / "calibration.npz").is_labelled
    calibrate(package, "--unlabelled", items, "--replace")
    assert not read_calibration(package.folder / "calibration.npz").is_labelled
    assert package.accuracy_file.read_bytes() == before
    # Those without labels may be replaced at any time.
    calibrate(package, "--unlabelled", items)


def test_a_model_without_labelled_samples_says_so(package: ModelPackage, tmp_path: Path) -> None:
    (package.folder / "model.toml").write_text(MODEL.partition("[samples]")[0])
    with pytest.raises(DatasetError, match=r"'echo' has no table \[samples\] in model\.toml; .*--unlabelled"):
        calibrate(package, "--data", tmp_path)


def rows(count: int) -> Calibration:
    """Of every 50 items, one is answered otherwise by one modality than by both."""
    both = np.zeros(count, np.int32)
    one = np.where(np.arange(count) % 50 == 7, 1, both).astype(np.int32)
    return Calibration(
        content_hash="",
        sets=[frozenset(["a"]), frozenset(["b"]), frozenset(["a", "b"])],
        answers=np.stack([one, (both + 1).astype(np.int32), both], 1),
        confidence=np.ones((count, 3), np.float32),
        labels=np.full(count, UNLABELLED, np.int32),
        groups=np.zeros((count, 0), np.int32),
        group_names=[],
        certify=np.arange(count) // 50 % 5 > 0,
    )


def test_more_rows_use_more_of_a_loss() -> None:
    few, many = savings(rows(250), None), savings(rows(5_000), None)
    assert all(less.used < more.used <= 1.01 for less, more in zip(few, many, strict=True))
    assert all(saving.saved is None for saving in few)
    needed = few[0].rows_for_half
    assert needed is not None
    assert few[0].used < 0.5 < many[0].used
    assert 250 < needed <= 5_000
    assert savings(rows(needed), None)[0].used >= 0.5
    assert savings(rows(needed // 2), None)[0].used < 0.5


def test_without_rows_that_certify_nothing_is_promised() -> None:
    assert savings(rows(40), None) == []
