"""Items without labels, from a folder of `.npy` files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.data.unlabelled import read_unlabelled
from mosel.errors import DatasetError
from mosel.packages.manifest import ModalitySpec

MODALITIES = {
    "photo": ModalitySpec(dtype="UINT8", shape=(4, 3), encoder="networks:Photo", embedding=(8,)),
    "scent": ModalitySpec(dtype="FP32", shape=(6,), encoder="networks:Scent", embedding=(8,)),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "photo.npy", np.arange(60, dtype=np.uint8).reshape(5, 4, 3))
    np.save(tmp_path / "scent.npy", np.ones((5, 6), np.float32))
    return tmp_path


def test_items_have_no_label_and_no_groups(folder: Path) -> None:
    samples = read_unlabelled(folder, MODALITIES)
    assert samples.labels.tolist() == [-1] * 5
    assert samples.payloads["photo"][4, 3, 2] == 59
    assert not samples.groups


@pytest.mark.parametrize(("groups", "columns"), [([1, 1, 2, 2, 3], 1), ([[1, 0], [1, 1], [2, 1], [2, 0], [3, 0]], 2)])
def test_groups_may_be_given(folder: Path, groups: list[Any], columns: int) -> None:
    np.save(folder / "groups.npy", np.array(groups, np.int32))
    read = list(read_unlabelled(folder, MODALITIES).groups.values())
    assert len(read) == columns
    assert read[0].tolist() == [1, 1, 2, 2, 3]


WRONG: dict[str, tuple[str, NDArray[Any], str]] = {
    "type": ("scent", np.ones((5, 6)), "scent.npy: float64 [5, 6]; expected float32 ['items', 6]"),
    "shape": ("photo", np.ones((5, 4), np.uint8), "photo.npy: uint8 [5, 4]; expected uint8 ['items', 4, 3]"),
    "count": ("scent", np.ones((4, 6), np.float32), "scent.npy: 4 items; expected 5, as photo.npy has"),
    "groups": ("groups", np.ones(4, np.int32), "groups.npy: int32 [4]; expected int32 [5] or [5, C]"),
    "group type": ("groups", np.ones(5), "groups.npy: float64 [5]; expected int32 [5] or [5, C]"),
    "objects": ("scent", np.array([{}] * 5, object), "scent.npy: not a readable .npy file"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_named(folder: Path, kind: str) -> None:
    name, array, message = WRONG[kind]
    np.save(folder / f"{name}.npy", array)
    with pytest.raises(DatasetError, match=re.escape(message)):
        read_unlabelled(folder, MODALITIES)


def test_missing_and_empty_files_are_named(folder: Path) -> None:
    (folder / "scent.npy").unlink()
    with pytest.raises(DatasetError, match=r"scent\.npy: no such file"):
        read_unlabelled(folder, MODALITIES)
    (folder / "scent.npy").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"scent\.npy: not a readable"):
        read_unlabelled(folder, MODALITIES)
    np.save(folder / "scent.npy", np.ones((0, 6), np.float32))
    np.save(folder / "photo.npy", np.ones((0, 4, 3), np.uint8))
    with pytest.raises(DatasetError, match="no items; expected one at least"):
        read_unlabelled(folder, MODALITIES)
