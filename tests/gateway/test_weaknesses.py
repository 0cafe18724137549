"""What modality sets do worst on."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from gateway.weaknesses import find_weaknesses
from mosel import SetInfo, Weakness
from mosel.packages.calibration import UNLABELLED, Calibration, save_calibration
from mosel.packages.model_package import ModelPackage, load_package
from mosel.v1 import gateway_pb2, selector_pb2
from tests.gateway.scripted import Gateway

FEW, ENOUGH, ROWS = 19, 20, 60


def calibration_of(labels: list[int], people: list[int], *answers: list[int]) -> Calibration:
    rows = len(labels)
    sets = [frozenset({"pen"}), frozenset({"image", "pen"})][: len(answers)]
    return Calibration(
        content_hash="0",
        sets=sets,
        answers=np.array(answers, np.int32).T,
        confidence=np.ones((rows, len(answers)), np.float32),
        labels=np.array(labels, np.int32),
        groups=np.array([[person, 0] for person in people], np.int32),
        group_names=["person", "take"],
        certify=np.ones(rows, np.bool_),
    )


def test_the_lowest_accuracy_of_labels_and_groups_that_have_enough_rows() -> None:
    labels = [0] * 40 + [1] * 40 + [2] * FEW
    people = [7] * ENOUGH + [8] * (99 - ENOUGH)
    # Of person 7 half are wrong; of the label that has too few rows all.
    pen = [1] * 10 + [0] * 30 + [1] * 39 + [0] + [0] * FEW
    found = find_weaknesses(calibration_of(labels, people, pen, labels), ["tea", "coffee", "cocoa"])
    assert found.keys() == {"pen", "image+pen"}
    label, group = found["pen"].label, found["pen"].group
    assert label is not None
    assert group is not None
    assert (label.name, label.accuracy, label.samples) == ("label tea", 0.75, 40)
    assert (group.name, group.accuracy, group.samples) == ("person 7", 0.5, ENOUGH)
    full = found["image+pen"].group
    assert full is not None
    assert full.accuracy == 1.0


def test_labels_without_a_name_are_numbers() -> None:
    labels = [3] * ENOUGH
    (found,) = find_weaknesses(calibration_of(labels, labels, labels), []).values()
    assert found.label is not None
    assert found.label.name == "label 3"


def test_rows_without_a_label_say_nothing() -> None:
    labels = [UNLABELLED] * 50 + [1] * FEW
    (found,) = find_weaknesses(calibration_of(labels, labels, labels), []).values()
    assert (found.label, found.group) == (None, None)


@pytest.fixture
def calibrated(models_dir: Path, tmp_path: Path) -> ModelPackage:
    """`fruit`, whose scents say nothing of person 0."""
    folder = shutil.copytree(models_dir / "fruit", tmp_path / "fruit")
    rows, sets = ROWS, [frozenset({"photo"}), frozenset({"scent"}), frozenset({"photo", "scent"})]
    people = np.arange(rows, dtype=np.int32)[:, np.newaxis] % 2
    calibration = Calibration(
        content_hash=load_package(folder).content_hash,
        sets=sets,
        answers=np.hstack([np.zeros((rows, 1)), 1 - people, np.zeros((rows, 1))]).astype(np.int32),
        confidence=np.ones((rows, 3), np.float32),
        labels=np.zeros(rows, np.int32),
        groups=people,
        group_names=["person"],
        certify=np.ones(rows, np.bool_),
    )
    save_calibration(folder / "calibration.npz", calibration)
    return load_package(folder)


async def test_models_are_listed_with_what_is_guaranteed_and_what_they_do_worst_on(
    gateway: Gateway, calibrated: ModelPackage
) -> None:
    gateway.data_plane.served.packages["fruit"] = calibrated
    profile = gateway_pb2.SetProfile(
        modality_set="scent", accuracy=0.75, available=True, guaranteed_accuracy=0.7, guaranteed_loss=0.25
    )
    state = selector_pb2.ModelState(model="fruit", ready=True, revision=calibrated.revision, sets=[profile])
    gateway.data_plane.link.models = {"fruit": state}
    for _ in range(2):
        (model,) = await gateway.client.models()
        label, person = (
            Weakness(f"label {calibrated.output.labels[0]}", 0.5, ROWS),
            Weakness("person 0", 0.0, ROWS // 2),
        )
        assert model.sets == {"scent": SetInfo(0.75, 0.0, True, 0.7, 0.25, label, person)}
    # What the selector said stays as it was.
    assert not state.sets[0].HasField("worst_label")
