"""Model packages: what is read, and what is said when something is wrong."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mosel.errors import ConfigError, PackageError
from mosel.packages.manifest import ModalitySpec, OutputSpec
from mosel.packages.model_package import find_packages, load_package

TOML = """
name = "{name}"
version = "1"
description = "smells and photos"
metric = "accuracy"
weights = "weights.safetensors"
accuracy = "accuracy.json"
default_min_accuracy = 0.5

[output]
name = "probabilities"
dtype = "FP32"
shape = [2]
labels = ["tea", "coffee"]

[modalities.scent]
dtype = "UINT8"
shape = [16]
encoder = "networks:ScentEncoder"
embedding = [4]

[modalities.photo]
dtype = "FP32"
shape = [8, 8]
encoder = "networks:PhotoEncoder"
embedding = [2, 2]

[fusion]
class = "networks:Fusion"

[samples]
module = "samples"

[train]
module = "train"
"""
SETS = {"photo": 0.7, "scent": 0.6, "photo+scent": 0.9}


def make(models: Path, name: str = "drinks", networks: str = "class Fusion: pass\n") -> Path:
    folder = models / name
    folder.mkdir()
    (folder / "model.toml").write_text(TOML.format(name=name))
    (folder / "networks.py").write_text(networks)
    (folder / "weights.safetensors").write_bytes(b"weights")
    write_accuracy(folder)
    return folder


def write_accuracy(folder: Path, **changes: Any) -> None:
    content = {
        "content_hash": load_package(folder).content_hash,
        "metric": "accuracy",
        "validation": {"samples": 50, "sets": SETS},
    }
    (folder / "accuracy.json").write_text(json.dumps(content | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


def change(folder: Path, old: str, new: str) -> None:
    file = folder / "model.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_everything_that_model_toml_says_is_read(folder: Path) -> None:
    package = load_package(folder)
    assert (package.name, package.version, package.description, package.metric) == (
        "drinks",
        "1",
        "smells and photos",
        "accuracy",
    )
    assert package.modalities == {
        "scent": ModalitySpec("UINT8", (16,), "networks:ScentEncoder", (4,)),
        "photo": ModalitySpec("FP32", (8, 8), "networks:PhotoEncoder", (2, 2)),
    }
    assert package.output == OutputSpec(name="probabilities", dtype="FP32", shape=(2,), labels=("tea", "coffee"))
    assert (package.fusion, package.samples, package.train) == ("networks:Fusion", "samples", "train")
    assert package.default_min_accuracy == 0.5
    assert (package.folder, package.weights) == (folder.resolve(), folder / "weights.safetensors")


def test_the_operator_s_floor_for_the_model(folder: Path) -> None:
    assert load_package(folder).max_accuracy_loss is None
    change(folder, "default_min_accuracy = 0.5", "max_accuracy_loss = 0.02")
    package = load_package(folder)
    assert (package.max_accuracy_loss, package.default_min_accuracy) == (0.02, None)


def test_what_may_be_left_out_has_a_default(folder: Path) -> None:
    for line in (
        'description = "smells and photos"\n',
        'metric = "accuracy"\n',
        'weights = "weights.safetensors"\n',
        'accuracy = "accuracy.json"\n',
        "default_min_accuracy = 0.5\n",
        'labels = ["tea", "coffee"]\n',
        'name = "probabilities"\ndtype = "FP32"\n',
        '[samples]\nmodule = "samples"\n',
        '[train]\nmodule = "train"\n',
    ):
        change(folder, line, "")
    write_accuracy(folder)
    package = load_package(folder)
    assert package.output == OutputSpec(shape=(2,))
    assert (package.samples, package.sources, package.train, package.default_min_accuracy) == (None,) * 4
    assert (package.random_weights, package.serve_by_default, package.parameters) == (False, True, {})
    assert (package.accuracy.samples, package.accuracy.source) == (50, "")


PHOTO = '[modalities.photo]\ndtype = "FP32"\nshape = [8, 8]'


@pytest.mark.parametrize(
    ("old", "new", "key", "expected"),
    [
        ('version = "1"', "version = 1", "'version' holds 1", "a string"),
        ('version = "1"', "", "'version' is missing", "a string"),
        ('name = "drinks"', 'name = "hot drinks"', "'name' holds 'hot drinks'", "letters, digits and _"),
        ("default_min_accuracy = 0.5", "default_min_accuracy = 50", "'default_min_accuracy' holds 50", "0 to 1"),
        ("default_min_accuracy = 0.5", "default_min_accuracy = nan", "'default_min_accuracy' holds nan", "0 to 1"),
        ("default_min_accuracy = 0.5", "max_accuracy_loss = 2", "'max_accuracy_loss' holds 2", "0 to 1"),
        ("default_min_accuracy = 0.5", "max_accuracy_loss = nan", "'max_accuracy_loss' holds nan", "0 to 1"),
        ("default_min_accuracy = 0.5", "default_min_accuracy = true", "holds True", "a number from 0 to 1"),
        ('version = "1"', 'version = "1"\nversoin = "1"', "'versoin' is unknown", "one of: accuracy, default"),
        ("shape = [2]", "shape = [0]", r"'output\.shape' holds \[0\]", "positive integers"),
        ("shape = [2]", 'shape = "2"', r"'output\.shape' holds '2'", "positive integers"),
        ("shape = [2]", "shape = [true]", r"'output\.shape' holds \[True\]", "positive integers"),
        ("shape = [2]", "shape = [3]", r"'output\.labels' holds 2 labels", "expected 3"),
        ('"tea", "coffee"', '"tea", 2', r"'output\.labels' holds", "a list of strings"),
        ("[output]", "[output]\nunit = 1", r"'output\.unit' is unknown", "dtype, labels, name, shape"),
        (PHOTO, PHOTO.replace("FP32", "FP31"), r"'modalities\.photo\.dtype' holds 'FP31'", "one of BOOL"),
        (PHOTO, PHOTO.replace('dtype = "FP32"', ""), r"'modalities\.photo\.dtype' is missing", "one of BOOL"),
        (PHOTO, PHOTO + "\nsize = 1", r"'modalities\.photo\.size' is unknown", "dtype, embedding, encoder, shape"),
        ("embedding = [4]", "", r"'modalities\.scent\.embedding' is missing", "positive integers"),
        ("networks:ScentEncoder", "networks.ScentEncoder", r"'modalities\.scent\.encoder' holds", "'module:Class'"),
        ("networks:Fusion", "../networks:Fusion", r"'fusion\.class' holds", "'module:Class'"),
        ("[fusion]\nclass", "[fuse]\nclass", "'fuse' is unknown", "one of: .*fusion"),
        ('[fusion]\nclass = "networks:Fusion"', "", "'fusion' is missing", "a table"),
        ('[fusion]\nclass = "networks:Fusion"', "[fusion]", r"'fusion\.class' is missing", "'module:Class'"),
        ("[modalities.scent]", '[modalities."a+b"]', r"'a\+b' in 'modalities'", "letters, digits and _"),
        ("[modalities.scent]", "[modalities.fusion]", "'fusion' in 'modalities'", "not 'fusion'"),
        ('[samples]\nmodule = "samples"', "[samples]", r"'samples\.module' is missing", "a string"),
        ('[train]\nmodule = "train"', '[train]\nmodule = "train"\nepochs = 3', r"'train\.epochs'", "one of: module"),
        ('[train]\nmodule = "train"', "[trian]", "'trian' is unknown", "expected one of"),
        ('version = "1"', 'version = "1"\nrandom_weights = 1', "'random_weights' holds 1", "true or false"),
        ('version = "1"', 'version = "1"\nserve_by_default = "no"', "'serve_by_default' holds 'no'", "true or false"),
        ('version = "1"', 'version = "1"\noptimise = 0', "'optimise' holds 0", "true or false"),
        ('version = "1"', 'version = "1"\ntolerance = 0.0', "'tolerance' holds 0.0", "a number above 0"),
        ('version = "1"', 'version = "1"\ntolerance = inf', "'tolerance' holds inf", "a number above 0"),
        ('version = "1"', 'version = "1"\nrandom_weights = true', "'weights' holds 'weights.safetensors'", "no such"),
        ('module = "train"', 'module = "train"\n[parameters]\nsize = "2"', r"'parameters\.size' holds '2'", "a number"),
        ('module = "train"', 'module = "train"\n[parameters]\nsize = true', r"'parameters\.size' holds True", "number"),
    ],
)
def test_a_wrong_key_is_named_with_its_file_and_what_was_expected(
    folder: Path, old: str, new: str, key: str, expected: str
) -> None:
    change(folder, old, new)
    with pytest.raises(PackageError, match=rf"model\.toml: .*{key}.*expected.*{expected}|{key}.*{expected}") as raised:
        load_package(folder)
    assert str(folder / "model.toml") in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name = ", "not valid TOML"),
        ("name = 'x'\nversion = '1'\nmodalities = 1", "'modalities' holds 1; expected at least one table"),
    ],
)
def test_a_file_that_is_no_package_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "model.toml").write_text(content)
    with pytest.raises(PackageError, match=rf"model\.toml: .*{message}"):
        load_package(folder)


def test_a_package_needs_a_modality_and_a_file(folder: Path) -> None:
    text = (folder / "model.toml").read_text()
    start, end = text.index("[modalities.scent]"), text.index("[fusion]")
    (folder / "model.toml").write_text(text[:start] + "[modalities]\n" + text[end:])
    with pytest.raises(PackageError, match=r"'modalities' holds \{\}; expected at least one table"):
        load_package(folder)
    (folder / "model.toml").unlink()
    with pytest.raises(PackageError, match=r"no such file; a model package is a folder with a model\.toml"):
        load_package(folder)


def test_accuracies_are_those_of_these_weights(folder: Path) -> None:
    package = load_package(folder)
    assert {"+".join(sorted(s)): value for s, value in package.accuracy.sets.items()} == SETS
    (folder / "weights.safetensors").write_bytes(b"other weights")
    assert package.accuracy.samples == 50, "read once"
    with pytest.raises(PackageError, match=r"not measured with the files .*as they are: .*`mosel calibrate drinks`"):
        _ = load_package(folder).accuracy
    (folder / "weights.safetensors").unlink()
    with pytest.raises(PackageError, match=r"weights\.safetensors: no such file"):
        _ = load_package(folder).accuracy


def test_accuracies_of_random_weights_are_from_elsewhere(folder: Path) -> None:
    change(folder, 'weights = "weights.safetensors"', "random_weights = true")
    content = {"source": "a paper", "validation": {"samples": 0, "sets": SETS}}
    (folder / "accuracy.json").write_text(json.dumps(content))
    (folder / "weights.safetensors").unlink()
    package = load_package(folder)
    assert package.random_weights
    assert (package.accuracy.samples, package.accuracy.source) == (0, "a paper")
    change(folder, "random_weights = true", "random_weights = false")
    with pytest.raises(PackageError, match=r"weights\.safetensors: no such file"):
        _ = load_package(folder).accuracy


def test_accuracies_of_the_old_format_name_no_files_and_are_refused(folder: Path) -> None:
    weights = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    content = {"weights_sha256": weights, "validation": {"samples": 50, "sets": SETS}}
    (folder / "accuracy.json").write_text(json.dumps(content))
    with pytest.raises(PackageError, match=r"'content_hash' is missing: an old format.*`mosel calibrate drinks`"):
        _ = load_package(folder).accuracy


def test_parameters_are_numbers_of_any_name(folder: Path) -> None:
    with (folder / "model.toml").open("a") as file:
        file.write("[parameters]\nscale = 0.25\nlayers = 3\n")
    assert load_package(folder).parameters == {"scale": 0.25, "layers": 3.0}


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"samples": 50, "sets": {k: SETS[k] for k in ("photo", "scent")}}, r"sets\.photo\+scent' is missing"),
        ({"samples": 50, "sets": SETS | {"sound": 0.5}}, r"sets\.sound' is unknown"),
        ({"samples": 50, "sets": SETS | {"photo": 70}}, "outside 0 to 1"),
        ({"samples": 50, "sets": SETS | {"photo": float("nan")}}, "outside 0 to 1"),
        ({"samples": 50, "sets": SETS | {"photo": None}}, "TypeError"),
        ({"samples": 50, "sets": []}, "AttributeError"),
        ({"sets": SETS}, "KeyError 'samples'"),
        (None, "TypeError"),
    ],
)
def test_wrong_accuracies_are_named(folder: Path, validation: object, message: str) -> None:
    write_accuracy(folder, validation=validation)
    with pytest.raises(PackageError, match=rf"accuracy\.json: .*{message}.*"):
        _ = load_package(folder).accuracy


@pytest.mark.parametrize("content", ["", "[]", "{}", "7", "not json"])
def test_an_accuracy_file_of_another_kind_says_how_to_write_it(folder: Path, content: str) -> None:
    (folder / "accuracy.json").write_text(content)
    with pytest.raises(PackageError, match=r"accuracy\.json: .*mosel\.compute\.training\.write_accuracy"):
        _ = load_package(folder).accuracy
    (folder / "accuracy.json").unlink()
    with pytest.raises(PackageError, match=r"accuracy\.json: no such file"):
        _ = load_package(folder).accuracy


def test_modules_are_loaded_by_path_and_import_each_other_relatively(folder: Path) -> None:
    (folder / "networks.py").write_text("from .sizes import SIZE\n\nclass Fusion:\n    size = SIZE\n")
    (folder / "sizes.py").write_text("SIZE = 42\n")
    package = load_package(folder)
    assert package.load_attribute("networks:Fusion").size == 42
    assert package.load_module("sizes").__name__ == "mosel_models.drinks.sizes"
    assert package.load_module("networks") is package.load_module("networks")


def test_modules_of_the_same_name_in_two_packages_do_not_clash(tmp_path: Path) -> None:
    first = load_package(make(tmp_path, "one", "from .sizes import SIZE\n"))
    second = load_package(make(tmp_path, "two", "from .sizes import SIZE\n"))
    (tmp_path / "one" / "sizes.py").write_text("SIZE = 1\n")
    (tmp_path / "two" / "sizes.py").write_text("SIZE = 2\n")
    assert (first.load_attribute("networks:SIZE"), second.load_attribute("networks:SIZE")) == (1, 2)
    assert (first.load_attribute("networks:SIZE"), second.load_attribute("networks:SIZE")) == (1, 2)


def test_a_package_of_the_same_name_in_another_folder_is_another_package(tmp_path: Path) -> None:
    values = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        package = load_package(make(tmp_path / str(i), networks=f"VALUE = {i}\n"))
        values.append(package.load_attribute("networks:VALUE"))
    assert values == [0, 1]


def test_loading_a_package_runs_none_of_its_code(tmp_path: Path) -> None:
    folder = make(tmp_path, networks="raise RuntimeError('ran')\n")
    assert load_package(folder).accuracy.samples == 50


@pytest.mark.parametrize("module", ["nowhere", "a.b", "../networks", "networks.Fusion", ""])
def test_a_module_that_is_not_there_is_named(folder: Path, module: str) -> None:
    with pytest.raises(PackageError, match=r"no such file, but model\.toml of 'drinks' names it"):
        load_package(folder).load_module(module)


def test_an_attribute_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(PackageError, match=r"networks\.py has no 'Fuse', which model\.toml names as 'networks:Fuse'"):
        load_package(folder).load_attribute("networks:Fuse")


def test_packages_are_found_by_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(tmp_path, name)
    (tmp_path / "notes").mkdir()
    assert list(find_packages(tmp_path)) == ["one", "two"]
    assert list(find_packages(tmp_path, ("two",))) == ["two"]


def test_a_package_may_be_served_only_where_it_is_named(tmp_path: Path) -> None:
    change(make(tmp_path, "two"), 'version = "1"', 'version = "1"\nserve_by_default = false')
    with pytest.raises(ConfigError, match=r"a model package .* to serve is not there; found: two"):
        find_packages(tmp_path)
    make(tmp_path, "one")
    assert list(find_packages(tmp_path)) == ["one"]
    assert list(find_packages(tmp_path, ("one", "two"))) == ["one", "two"]


def test_what_is_not_found_is_named_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        find_packages(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"a model package .* is not there; found: none"):
        find_packages(tmp_path)
    make(tmp_path, "one")
    with pytest.raises(ConfigError, match="model 'two' is not there; found: one"):
        find_packages(tmp_path, ("one", "two"))


def test_a_folder_must_have_its_package_s_name(tmp_path: Path) -> None:
    make(tmp_path).rename(tmp_path / "other")
    with pytest.raises(PackageError, match="name is 'drinks'; expected the folder's name, 'other'"):
        find_packages(tmp_path)


def test_one_wrong_package_does_not_keep_another_from_being_served(tmp_path: Path) -> None:
    make(tmp_path, "good")
    (make(tmp_path, "bad") / "model.toml").write_text("")
    assert list(find_packages(tmp_path, ("good",))) == ["good"]
