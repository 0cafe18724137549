"""mosel.compute.training on a package of two modalities whose accuracies are known beforehand."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mosel.compute.training import save_weights, score, write_accuracy, write_report
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


MODEL = """
name = "vote"
version = "1"
description = "sure and coarse"

[output]
name = "probabilities"
dtype = "FP32"
shape = [2]

[modalities.sure]
dtype = "FP32"
shape = [2]
encoder = "networks:Sure"
embedding = [2]

[modalities.coarse]
dtype = "FP32"
shape = [2]
encoder = "networks:Coarse"
embedding = [2]

[fusion]
class = "networks:Vote"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model package without weights."""
    folder = tmp_path / "vote"
    folder.mkdir()
    (folder / "model.toml").write_text(MODEL)
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
    accuracy = score(encoders, Vote(), samples(600)).accuracy
    assert accuracy == {"coarse": 0.5, "sure": 1.0, "coarse+sure": 1.0}


def test_measuring_switches_dropout_off(encoders: dict[str, nn.Module]) -> None:
    score(encoders, Vote(), samples(4))
    assert not encoders["coarse"].training


def test_an_odd_number_of_items_counts_each_once(encoders: dict[str, nn.Module]) -> None:
    assert score(encoders, Vote(), samples(501)).accuracy["coarse"] in (250 / 501, 251 / 501)


def test_weights_come_back_under_their_keys(tmp_path: Path, encoders: dict[str, nn.Module]) -> None:
    path = save_weights(tmp_path / "new", encoders, Vote())
    weights = load_file(path)
    assert set(weights) == {"encoders.coarse.0.weight", "encoders.coarse.0.bias", "fusion.scale"}
    assert torch.equal(weights["encoders.coarse.0.weight"], encoders["coarse"].state_dict()["0.weight"])
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


def written_for(folder: Path, encoders: dict[str, nn.Module], calibration: Samples | None = None) -> dict[str, Any]:
    scores = [score(encoders, Vote(), given) for given in (calibration or samples(10), samples(20))]
    return write_accuracy(folder, calibration=scores[0], test=scores[1], source="a test")


def test_accuracy_is_bound_to_the_files(folder: Path, encoders: dict[str, nn.Module]) -> None:
    save_weights(folder, encoders, Vote())
    written = written_for(folder, encoders)
    assert json.loads((folder / "accuracy.json").read_text()) == written
    package = load_package(folder)
    assert written["content_hash"] == package.content_hash
    assert package.accuracy.sets[frozenset(["sure"])] == 1.0
    assert (written["metric"], written["validation"]["samples"], written["test"]["samples"]) == ("accuracy", 10, 20)
    assert written["test"]["sets"] == {"coarse": 0.5, "sure": 1.0, "coarse+sure": 1.0}


def test_accuracy_needs_saved_weights(folder: Path, encoders: dict[str, nn.Module]) -> None:
    with pytest.raises(PackageError, match=r"weights\.safetensors: no such file; save_weights writes it"):
        written_for(folder, encoders)


def test_accuracy_in_a_folder_of_its_own_is_that_of_the_package_once_it_is_put_there(
    folder: Path, tmp_path: Path, encoders: dict[str, nn.Module]
) -> None:
    apart = tmp_path / "apart"
    (folder / "weights.safetensors").write_bytes(b"weights of before")
    save_weights(apart, encoders, Vote())
    scores = score(encoders, Vote(), samples(10))
    write_accuracy(apart, calibration=scores, test=scores, package=folder)
    shutil.copytree(apart, folder, dirs_exist_ok=True)
    package = load_package(folder)
    assert package.accuracy.samples == 10
    assert package.calibration is not None


def test_calibration_rows_say_what_was_answered(folder: Path, encoders: dict[str, nn.Module]) -> None:
    save_weights(folder, encoders, Vote())
    given = samples(10)
    people = np.arange(10) // 2
    written_for(folder, encoders, replace(given, groups={"person": people, "take": np.arange(10)}))
    calibration = load_package(folder).calibration
    assert calibration is not None
    sure = list(calibration.sets).index(frozenset(["sure"]))
    assert calibration.answers[:, sure].tolist() == given.labels.tolist() == calibration.labels.tolist()
    assert calibration.confidence[:, sure] == pytest.approx(1.0)
    assert calibration.groups.T.tolist() == [people.tolist(), list(range(10))]
    assert (list(calibration.group_names), calibration.source) == (["person", "take"], "a test")
    # Nobody said which rows certify: whole people are drawn.
    assert len(set(people[calibration.certify])) == 4
    assert not set(people[calibration.certify]) & set(people[~calibration.certify])


def test_rows_certify_that_are_said_to(folder: Path, encoders: dict[str, nn.Module]) -> None:
    save_weights(folder, encoders, Vote())
    certify = np.arange(10) == 7
    written_for(folder, encoders, replace(samples(10), certify=certify))
    calibration = load_package(folder).calibration
    assert calibration is not None
    assert calibration.certify.tolist() == certify.tolist()


def test_bits_of_bfloat16_are_no_integers(encoders: dict[str, nn.Module]) -> None:
    given = samples(4)
    bits = (given.payloads["sure"].view(np.uint32) >> 16).astype(np.uint16)

    class Widen(nn.Module):
        def forward(self, payload: Tensor) -> Tensor:
            assert payload.dtype == torch.bfloat16
            return payload.float()

    scores = score({**encoders, "sure": Widen()}, Vote(), replace(given, payloads={**given.payloads, "sure": bits}))
    assert scores.accuracy["sure"] == 1.0


def test_report_names_seed_time_and_counts(folder: Path, encoders: dict[str, nn.Module]) -> None:
    save_weights(folder, encoders, Vote())
    write_report(folder, written_for(folder, encoders), seed=7, seconds=12.4)
    report = json.loads((folder / "report.json").read_text())
    assert (report["seed"], report["seconds"], report["torch"]) == (7, 12, torch.__version__)
    text = (folder / "report.md").read_text()
    assert "seed 7" in text
    assert "| modality set | calibration (10 samples) | test (20 samples) |" in text
    assert "| coarse+sure | 1.000 | 1.000 |" in text


def test_samples_that_contradict_themselves_are_refused() -> None:
    labels = np.zeros(3, np.int64)
    with pytest.raises(DatasetError, match=r"image has shape .*expected 3 rows"):
        Samples({"image": np.zeros((2, 4), np.float32)}, labels)
    with pytest.raises(DatasetError, match="payloads is empty"):
        Samples({}, labels)
    with pytest.raises(DatasetError, match=r"labels is float64"):
        Samples({"image": np.zeros(3)}, np.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=r"groups by person are int64 \(2,\), expected integers \[N\]"):
        Samples({"image": np.zeros(3)}, labels, {"person": np.zeros(2, np.int64)})
    with pytest.raises(DatasetError, match=r"certify is float64 \(3,\), expected bool \[N\]"):
        Samples({"image": np.zeros(3)}, labels, certify=np.zeros(3))  # type: ignore[arg-type]


def test_take_keeps_rows_together() -> None:
    given = replace(samples(10), groups={"person": np.arange(10) * 2}, certify=np.arange(10) < 4)
    taken = given.take(np.array([3, 4]))
    assert taken.labels.tolist() == [1, 0]
    assert taken.groups["person"].tolist() == [6, 8]
    assert taken.certify is not None
    assert taken.certify.tolist() == [True, False]
    assert taken.payloads["sure"].argmax(1).tolist() == [1, 0]
