"""What a measurement is bound to: every file that can change what a package computes, and nothing else."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mosel.errors import PackageError
from mosel.modality import subsets
from mosel.packages.calibration import UNLABELLED, Calibration, save_calibration
from mosel.packages.content import file_sha256
from mosel.packages.model_package import load_package
from tests.fruit_on_disk import Fruit


def write(name: str, content: bytes = b"some bytes") -> Callable[[Fruit], None]:
    def change(fruit: Fruit) -> None:
        (fruit.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (fruit.folder / name).write_bytes(content)

    return change


def edit(file: str, old: str, new: str) -> Callable[[Fruit], None]:
    return lambda fruit: fruit.edit(file, old, new)


def linked(fruit: Fruit) -> None:
    elsewhere = fruit.folder.parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "table.csv").write_text("1,2,3\n")
    (fruit.folder / "tables").symlink_to(elsewhere, target_is_directory=True)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(edit("networks.py", "nn.Linear(8, 3)", "nn.Linear(8, 3, True)"), id="code"),
        pytest.param(write("parts/layers.py"), id="code in a folder below"),
        pytest.param(write("scent.onnx"), id="ONNX"),
        pytest.param(write("words.txt"), id="what code may read"),
        pytest.param(write("tables/report.json"), id="a report that is none"),
        pytest.param(linked, id="a folder that is linked to"),
        pytest.param(write("weights.safetensors"), id="weights"),
        pytest.param(edit("model.toml", 'version = "1"', 'version = "2"'), id="version"),
        pytest.param(edit("model.toml", '["apple", "lemon", "plum"]', '["plum", "lemon", "apple"]'), id="labels"),
        pytest.param(edit("model.toml", "[fusion]", "[parameters]\nscale = 2.0\n\n[fusion]"), id="parameters"),
    ],
)
def test_what_can_change_what_is_computed_voids_the_accuracies(
    changing: Fruit, change: Callable[[Fruit], None]
) -> None:
    before = load_package(changing.folder)
    assert before.accuracy.samples
    change(changing)
    after = load_package(changing.folder)
    assert len({before.content_hash, after.content_hash}) == len({before.revision, after.revision}) == 2
    with pytest.raises(PackageError, match=r"accuracy\.json: not measured with the files .* `mosel calibrate fruit`"):
        _ = after.accuracy


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(write("README.md"), id="Markdown"),
        pytest.param(write("report.json"), id="report"),
        pytest.param(write(".git/index"), id="hidden folder"),
        pytest.param(write(".hidden.py"), id="hidden file"),
        pytest.param(write("__pycache__/networks.cpython-311.pyc"), id="cache"),
        pytest.param(write("parts/__pycache__/anything"), id="cache in a folder below"),
        pytest.param(write("networks.pyc"), id="compiled"),
        pytest.param(write("weights.safetensors.partial"), id="half written"),
        pytest.param(lambda fruit: os.utime(fruit.folder / "networks.py", (1, 1)), id="time"),
    ],
)
def test_what_changes_nothing_leaves_the_package_as_it_is(changing: Fruit, change: Callable[[Fruit], None]) -> None:
    before = load_package(changing.folder)
    change(changing)
    assert load_package(changing.folder) == before


def test_the_operators_keys_make_another_revision_of_the_same_content(changing: Fruit) -> None:
    before = load_package(changing.folder)
    toml = (changing.folder / "model.toml").read_text()
    lines = [line for line in toml.splitlines() if not line.startswith(("description", "default_min_accuracy"))]
    mine = ['description = "any"', "default_min_accuracy = 0.7", "serve_by_default = false"]
    (changing.folder / "model.toml").write_text("\n".join([*mine, *lines]))
    after = load_package(changing.folder)
    assert (after.description, after.default_min_accuracy, after.serve_by_default) == ("any", 0.7, False)
    assert after.content_hash == before.content_hash
    assert after.revision != before.revision
    assert after.has_networks_of(before)
    assert after.accuracy == before.accuracy


@pytest.mark.parametrize("key", ["optimise = false", "tolerance = 0.01"])
def test_the_form_of_networks_needs_no_new_accuracies_but_new_latencies(changing: Fruit, key: str) -> None:
    before = load_package(changing.folder)
    changing.edit("model.toml", 'version = "1"', f'version = "1"\n{key}')
    after = load_package(changing.folder)
    assert (after.content_hash, after.code) == (before.content_hash, before.code)
    assert after.accuracy == before.accuracy
    assert not after.has_networks_of(before)


def test_weights_count_wherever_they_are(changing: Fruit) -> None:
    before = load_package(changing.folder)
    apart = changing.folder.parent / "apart.safetensors"
    (changing.folder / "weights.safetensors").rename(apart)
    changing.edit("model.toml", 'weights = "weights.safetensors"', 'weights = "../apart.safetensors"')
    first = load_package(changing.folder)
    apart.write_bytes(b"others")
    second = load_package(changing.folder)
    assert len({before.content_hash, first.content_hash, second.content_hash}) == 3
    assert second.has_networks_of(first)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=rf"^{tmp_path}: Is a directory; expected a file that can be read$"):
        file_sha256(tmp_path)


@pytest.fixture
def calibration(changing: Fruit) -> Calibration:
    package, rows = load_package(changing.folder), 6
    sets = subsets(package.modalities)
    return Calibration(
        content_hash=package.content_hash,
        sets=sets,
        answers=np.arange(rows * len(sets), dtype=np.int32).reshape(rows, -1) % 3,
        confidence=np.full((rows, len(sets)), 0.5, np.float32),
        labels=np.array([0, 1, 2, 0, 1, 2], np.int32),
        groups=np.zeros((rows, 1), np.int32),
        group_names=["tree"],
        certify=np.ones(rows, np.bool_),
    )


def test_calibration_rows_are_read_and_are_a_part_of_the_revision(changing: Fruit, calibration: Calibration) -> None:
    before = load_package(changing.folder)
    assert before.calibration is None
    save_calibration(changing.folder / "calibration.npz", calibration)
    with pytest.raises(PackageError, match="the files changed while they were read"):
        before.check_unchanged()
    after = load_package(changing.folder)
    after.check_unchanged()
    assert after.content_hash == before.content_hash
    assert after.revision != before.revision
    assert after.calibration is not None
    assert after.calibration.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_calibration_rows_guarantee_nothing_of_other_metrics(changing: Fruit, calibration: Calibration) -> None:
    save_calibration(changing.folder / "calibration.npz", calibration)
    package = load_package(changing.folder)
    assert package.calibration is not None
    assert replace(package, metric="f1").calibration is None


def test_calibration_rows_need_no_labels(changing: Fruit, calibration: Calibration) -> None:
    save_calibration(changing.folder / "calibration.npz", replace(calibration, labels=np.full(6, UNLABELLED, np.int32)))
    found = load_package(changing.folder).calibration
    assert found is not None
    assert not found.is_labelled


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"content_hash": "0" * 64}, r"not measured with the files .*'content_hash' holds '000000000000\.\.\.'"),
        ({"sets": subsets(["photo", "touch"])}, r"sets are .*touch.*; expected each set of photo\+scent once"),
        ({"sets": [*subsets(["photo"])] * 3}, r"sets are photo, photo, photo; expected each set of photo\+scent once"),
        ({"answers": np.full((6, 3), 3, np.int32)}, r"answers are 3 to 3; expected 0 to 2, as output\.shape is \[3\]"),
        ({"answers": np.full((6, 3), -1, np.int32)}, r"answers are -1 to -1; expected 0 to 2"),
        ({"labels": np.full(6, 7, np.int32)}, r"labels are 7 to 7; expected -1 to 2"),
    ],
)
def test_calibration_rows_of_something_else_are_refused(
    changing: Fruit, calibration: Calibration, wrong: dict[str, object], message: str
) -> None:
    save_calibration(changing.folder / "calibration.npz", replace(calibration, **wrong))  # type: ignore[arg-type]
    package = load_package(changing.folder)
    with pytest.raises(PackageError, match=rf"calibration\.npz: {message}"):
        _ = package.calibration
    with pytest.raises(PackageError, match=message):
        package.check_unchanged()
