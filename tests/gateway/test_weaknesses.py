"""What modality sets do worst on."""

import numpy as np

from gateway.weaknesses import find_weaknesses
from mosel.packages.calibration import UNLABELLED, Calibration

FEW, ENOUGH = 19, 20


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
