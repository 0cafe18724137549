"""mosel.compute.training on a package of two modalities whose accuracies are known beforehand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mosel.compute.training import measure_accuracy, save_weights, write_accuracy, write_report
from mosel.data.samples import Samples
from mosel.errors import DatasetError, PackageError
from mosel.packages.model_package import load_package


class Vote(nn.Module):
    """Adds up what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, embeddings: dict[str, Tensor]) -> Tensor:
        return (torch.stack(list(embeddings.values())).sum(0) * self.scale).softmax(-1)


TOML = """
name = "votes"
version = "1"

[output]
shape = [2]

[modalities.coarse]
dtype = "FP32"
shape = [2]
encoder = "networks:Coarse"
embedding = [2]

[modalities.sure]
dtype = "FP32"
shape = [2]
encoder = "networks:Sure"
embedding = [2]

[fusion]
class = "networks:Vote"
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "votes"
    folder.mkdir()
    (folder / "model.toml").write_text(TOML)
    return folder


@pytest.fixture
def encoders() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"sure": nn.Identity(), "coarse": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))}


def samples(items: int) -> Samples:
    """`sure` is right for every item; `coarse` is the same for all, so it is right for one class alone."""
    labels = np.arange(items) % 2
    sure = np.eye(2, dtype=np.float32)[labels] * 100
    return Samples({"sure": sure, "coarse": np.ones((items, 2), np.float32)}, labels)


def test_accuracy_of_every_set(encoders: dict[str, nn.Module]) -> None:
    accuracy = measure_accuracy(encoders, Vote(), samples(600))
    assert accuracy == {"coarse": 0.5, "sure": 1.0, "coarse+sure": 1.0}


def test_measuring_switches_dropout_off(encoders: dict[str, nn.Module]) -> None:
    measure_accuracy(encoders, Vote(), samples(4))
    assert not encoders["coarse"].training


def test_an_odd_number_of_items_counts_each_once(encoders: dict[str, nn.Module]) -> None:
    assert measure_accuracy(encoders, Vote(), samples(501))["coarse"] in (250 / 501, 251 / 501)


def test_weights_come_back_under_their_keys(tmp_path: Path, encoders: dict[str, nn.Module]) -> None:
    path = save_weights(tmp_path / "new", encoders, Vote())
    weights = load_file(path)
    assert set(weights) == {"encoders.coarse.0.weight", "encoders.coarse.0.bias", "fusion.scale"}
    assert torch.equal(weights["encoders.coarse.0.weight"], encoders["coarse"].state_dict()["0.weight"])
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


def test_accuracy_is_bound_to_the_package(package: Path, encoders: dict[str, nn.Module]) -> None:
    save_weights(package, encoders, Vote())
    written = write_accuracy(package, encoders, Vote(), validation=samples(10), test=samples(20))
    assert json.loads((package / "accuracy.json").read_text()) == written
    assert written["content_hash"] == load_package(package).content_hash
    assert load_package(package).accuracy.samples == 10
    assert (written["metric"], written["validation"]["samples"], written["test"]["samples"]) == ("accuracy", 10, 20)
    assert written["test"]["sets"] == {"coarse": 0.5, "sure": 1.0, "coarse+sure": 1.0}


def test_accuracy_in_a_folder_of_its_own_is_that_of_the_package_once_it_is_put_there(
    package: Path, tmp_path: Path, encoders: dict[str, nn.Module]
) -> None:
    apart = tmp_path / "apart"
    (package / "weights.safetensors").write_bytes(b"weights of before")
    save_weights(apart, encoders, Vote())
    write_accuracy(apart, encoders, Vote(), validation=samples(10), test=samples(20), package=package)
    shutil.copytree(apart, package, dirs_exist_ok=True)
    assert load_package(package).accuracy.samples == 10


def test_accuracy_needs_saved_weights(package: Path, encoders: dict[str, nn.Module]) -> None:
    with pytest.raises(PackageError, match=r"weights\.safetensors: no such file; save_weights writes it"):
        write_accuracy(package, encoders, Vote(), validation=samples(2), test=samples(2))


def test_report_names_seed_time_and_counts(package: Path, encoders: dict[str, nn.Module]) -> None:
    save_weights(package, encoders, Vote())
    accuracy = write_accuracy(package, encoders, Vote(), validation=samples(10), test=samples(20))
    write_report(package, accuracy, seed=7, seconds=12.4)
    report = json.loads((package / "report.json").read_text())
    assert (report["seed"], report["seconds"], report["torch"]) == (7, 12, torch.__version__)
    text = (package / "report.md").read_text()
    assert "seed 7" in text
    assert "| modality set | validation (10 samples) | test (20 samples) |" in text
    assert "| coarse+sure | 1.000 | 1.000 |" in text


def test_samples_that_contradict_themselves_are_refused() -> None:
    labels = np.zeros(3, np.int64)
    with pytest.raises(DatasetError, match=r"image has shape .*expected 3 rows"):
        Samples({"image": np.zeros((2, 4), np.float32)}, labels)
    with pytest.raises(DatasetError, match="payloads is empty"):
        Samples({}, labels)
    with pytest.raises(DatasetError, match=r"labels is float64"):
        Samples({"image": np.zeros(3)}, np.zeros(3))  # type: ignore[arg-type]


def test_take_keeps_rows_together() -> None:
    taken = samples(10).take(np.array([3, 4]))
    assert taken.labels.tolist() == [1, 0]
    assert taken.payloads["sure"].argmax(1).tolist() == [1, 0]
