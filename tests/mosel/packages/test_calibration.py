"""Calibration rows: who certifies where nothing says so, and the file."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mosel.errors import PackageError
from mosel.packages.calibration import UNLABELLED, Calibration, drawn_roles, read_calibration, save_calibration


def calibration(rows: int = 6) -> Calibration:
    return Calibration(
        content_hash="abc",
        sets=[frozenset(["a"]), frozenset(["a", "b"])],
        answers=np.arange(rows * 2, dtype=np.int32).reshape(rows, 2),
        confidence=np.full((rows, 2), 0.5, np.float32),
        labels=np.arange(rows, dtype=np.int32),
        groups=np.arange(rows, dtype=np.int32)[:, None],
        group_names=["person"],
        certify=np.arange(rows) > 1,
        source="a test",
    )


@pytest.mark.parametrize(("people", "choosing"), [(1, 0), (2, 1), (3, 1), (21, 4), (100, 20)])
def test_about_a_fifth_of_the_groups_chooses_rules(people: int, choosing: int) -> None:
    person = np.repeat(np.arange(people, dtype=np.int32), 7)
    certify = drawn_roles(np.stack([person, np.arange(len(person), dtype=np.int32)], 1))
    assert len(set(person[~certify])) == choosing
    assert not set(person[~certify]) & set(person[certify])


def test_without_groups_every_item_is_its_own() -> None:
    certify = drawn_roles(np.zeros((50, 0), np.int32))
    assert (~certify).sum() == 10
    assert np.array_equal(certify, drawn_roles(np.zeros((50, 0), np.int32)))


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    saved = calibration()
    save_calibration(tmp_path / "calibration.npz", saved)
    read = read_calibration(tmp_path / "calibration.npz")
    for name in ("answers", "confidence", "labels", "groups", "certify"):
        np.testing.assert_array_equal(getattr(read, name), getattr(saved, name))
    assert (read.content_hash, list(read.sets), read.group_names, read.source) == (
        "abc",
        saved.sets,
        ["person"],
        "a test",
    )
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.npz"]


def test_a_row_without_label_makes_it_unlabelled() -> None:
    labels = calibration().labels.copy()
    assert calibration().is_labelled
    labels[2] = UNLABELLED
    assert not replace(calibration(), labels=labels).is_labelled


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"answers is int32 \[5, 2\]; expected int32 \[6, 2\]"):
        replace(calibration(), answers=np.zeros((5, 2), np.int32))
    with pytest.raises(ValueError, match=r"certify is int64 \[6\]; expected bool \[6\]"):
        replace(calibration(), certify=np.arange(6))  # type: ignore[arg-type]


def damaged() -> dict[str, bytes]:
    stream = io.BytesIO()
    np.savez(stream, answers=np.array([{}], object))
    whole = io.BytesIO()
    np.savez(whole, answers=np.zeros((1, 1), np.int32))
    return {"nothing": b"", "text": b"rows", "half": whole.getvalue()[:40], "objects": stream.getvalue()}


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_file_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "calibration.npz").write_bytes(damaged()[kind])
    with pytest.raises(PackageError, match=r"calibration\.npz: .*expected calibration rows"):
        read_calibration(tmp_path / "calibration.npz")
