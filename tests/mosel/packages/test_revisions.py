"""What a package is told from an earlier one by, and networks of several revisions in one process."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mosel.compute import networks
from mosel.compute.networks import Hosted
from mosel.errors import ModelNotFound, PackageError
from mosel.packages.model_modules import forget_modules
from mosel.packages.model_package import ModelPackage, find_package, load_package
from tests.fruit_on_disk import Fruit, measured

CPU = torch.device("cpu")


def revision_of(changing: Fruit) -> str:
    return load_package(changing.folder).revision


def test_the_same_files_are_the_same_revision_wherever_they_are(changing: Fruit, tmp_path: Path) -> None:
    first = load_package(changing.folder)
    assert first.id == f"fruit@{first.revision}"
    assert len(first.revision) == 16
    moved = shutil.copytree(changing.folder, tmp_path / "elsewhere" / "fruit")
    os.utime(moved / "networks.py", (1, 1))
    (moved / "notes.md").write_text("not a part of it")
    assert load_package(moved).revision == first.revision


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("model.toml", 'version = "1"', 'version = "2"'),
        ("networks.py", "nn.Linear(8, 3)", "nn.Linear(8, 3, True)"),
        ("accuracy.json", '"samples": 1000', '"samples": 999'),
    ],
)
def test_every_file_that_matters_makes_another_revision(changing: Fruit, file: str, old: str, new: str) -> None:
    before = revision_of(changing)
    changing.edit(file, old, new)
    assert revision_of(changing) != before
    changing.edit(file, new, old)
    assert revision_of(changing) == before


def test_other_weights_are_another_revision_with_networks_that_take_the_same_time(changing: Fruit) -> None:
    before = load_package(changing.folder)
    changing.change(1)
    after = load_package(changing.folder)
    assert after.revision != before.revision
    assert after.has_networks_of(before)
    changing.edit("networks.py", "nn.Linear(8, 3)", "nn.Linear(8, 3, True)")
    assert not load_package(changing.folder).has_networks_of(after)


def test_a_package_in_a_folder_below_counts_too(changing: Fruit) -> None:
    before = revision_of(changing)
    (changing.folder / "parts").mkdir()
    (changing.folder / "parts" / "layers.py").write_text("SIZE = 8\n")
    with_parts = revision_of(changing)
    (changing.folder / "parts" / "layers.py").rename(changing.folder / "parts" / "sizes.py")
    assert len({before, with_parts, revision_of(changing)}) == 3


def test_files_that_changed_since_are_noticed(changing: Fruit) -> None:
    package = load_package(changing.folder)
    package.check_unchanged()
    changing.edit("model.toml", 'version = "1"', 'version = "2"')
    with pytest.raises(PackageError, match=r"fruit: the files changed while they were read; load the model again$"):
        package.check_unchanged()
    package = load_package(changing.folder)
    with (changing.folder / "weights.safetensors").open("ab") as weights:
        weights.write(b" ")
    with pytest.raises(PackageError, match="the files changed while they were read"):
        package.check_unchanged()
    with pytest.raises(PackageError, match=r"accuracy\.json: not measured with the files"):
        load_package(changing.folder).check_unchanged()


def test_a_package_is_found_by_name_or_as_the_revision_that_it_is(changing: Fruit) -> None:
    models, package = changing.folder.parent, load_package(changing.folder)
    assert find_package(models, "fruit") == find_package(models, package.id) == package
    with pytest.raises(PackageError, match=rf"fruit: the files are {package.id}; expected fruit@0123456789abcdef$"):
        find_package(models, "fruit@0123456789abcdef")
    for name in ("tree", "", "..", "../models/fruit", "@", f"@{package.revision}"):
        with pytest.raises(ModelNotFound, match=r"model '.*' is not there; found: fruit"):
            find_package(models, name)


def values(package: ModelPackage) -> list[object]:
    return [package.load_attribute("networks:VALUE"), package.load_attribute("sizes:SIZE")]


def test_modules_are_read_again_once_they_are_forgotten(changing: Fruit) -> None:
    """However soon after: neither the time nor the size of the files tells the old from the new."""
    package = load_package(changing.folder)
    code = (changing.folder / "networks.py").read_text()
    (changing.folder / "sizes.py").write_text("SIZE = 1\n")
    (changing.folder / "networks.py").write_text(f"from .sizes import SIZE\n{code}\nVALUE = SIZE\n")
    forget_modules("fruit")
    for size in range(1, 6):
        (changing.folder / "sizes.py").write_text(f"SIZE = {size}\n")
        os.utime(changing.folder / "sizes.py", (1, 1))
        assert values(package) != [size, size] or size == 1
        forget_modules("fruit")
        assert values(package) == [size, size]
    (changing.folder / "more.py").write_text("MORE = 7\n")
    forget_modules("fruit")
    assert package.load_attribute("more:MORE") == 7
    assert not list(changing.folder.glob("**/*.pyc"))


def test_modules_in_a_folder_below_are_read_again_too(changing: Fruit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    package, parts = load_package(changing.folder), changing.folder / "parts"
    parts.mkdir()
    code = (changing.folder / "networks.py").read_text()
    (changing.folder / "networks.py").write_text(f"from .parts.sizes import SIZE\n{code}")
    for size in range(1, 4):
        (parts / "sizes.py").write_text(f"SIZE = {size}\n")
        os.utime(parts / "sizes.py", (1, 1))
        forget_modules("fruit")
        assert package.load_attribute("networks:SIZE") == size
    assert not list(changing.folder.glob("**/*.pyc"))


def test_forgetting_one_model_leaves_others(changing: Fruit, fruit: ModelPackage) -> None:
    kept = fruit.load_module("networks")
    forget_modules("frui")
    assert fruit.load_module("networks") is kept


def hosted(loaded: list[str]) -> Hosted:
    def warm(host: networks.Loaded) -> None:
        loaded.append(host.package.id)
        host.network(torch.zeros(1, 6))

    return Hosted(lambda package: networks.load_encoder(package, "scent", CPU), warm, CPU)


def test_revisions_are_there_side_by_side_until_they_are_unloaded(changing: Fruit) -> None:
    warmed: list[str] = []
    host, scents = hosted(warmed), torch.rand(4, 6)
    expected = {}
    for seed in range(3):
        changing.change(seed)
        package = load_package(changing.folder)
        host.load(package)
        host.load(package)
        expected[package.id] = networks.load_encoder(package, "scent", CPU)(scents).numpy()
    assert host.models == warmed == list(expected)
    for model, embeddings in expected.items():
        loaded = host.get(model)
        assert loaded is not None
        np.testing.assert_array_equal(loaded.network(scents).numpy(), embeddings)
    for model in list(expected):
        host.unload(model)
        host.unload(model)
        assert host.get(model) is None
    assert host.models == []


def test_old_networks_keep_their_code(changing: Fruit) -> None:
    host, scents = hosted([]), torch.rand(4, 6)
    host.load(before := load_package(changing.folder))
    changing.edit(
        "networks.py",
        "super().__init__(6, 8)\n",
        "super().__init__(6, 8)\n\n    def forward(self, payload: Tensor) -> Tensor:\n"
        "        return -super().forward(payload)\n",
    )
    host.load(after := measured(changing.folder))
    old, new = host.get(before.id), host.get(after.id)
    assert old is not None
    assert new is not None
    assert torch.equal(old.network(scents), -new.network(scents))


def test_what_cannot_be_loaded_is_not_there(changing: Fruit) -> None:
    host = hosted([])
    package = load_package(changing.folder)
    changing.change(1)
    with pytest.raises(PackageError, match="the files changed while they were read"):
        host.load(package)
    changing.edit("networks.py", "super().__init__(6, 8)", "super().__init__(5, 8)")
    with pytest.raises(PackageError, match="do not fit"):
        host.load(load_package(changing.folder))
    assert host.models == []
