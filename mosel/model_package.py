"""Model packages: a folder with `model.toml`, the Python modules it names, weights and measured accuracies.

A package runs code: only trusted folders may be loaded.
"""

import hashlib
import importlib.util
import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from mosel.errors import ConfigError, PackageError
from mosel.modality import ModalitySet, format_set, parse_set, subsets
from mosel.tensors import DTYPES

_NAMESPACE = "mosel_models"


@dataclass(frozen=True)
class ModalitySpec:
    """One named input.

    Attributes:
        dtype: name of the payload's data type, `FP32`.
        shape: payload shape of one item.
        encoder: `module:Class` of the encoder network.
        embedding: embedding shape of one item, FP32.
    """

    dtype: str
    shape: tuple[int, ...]
    encoder: str
    embedding: tuple[int, ...]


@dataclass(frozen=True)
class OutputSpec:
    """What the fusion network returns, per item; `labels` name the last axis."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of each modality set, 0..1, measured on `samples` items of the validation split.

    Where the figures were not measured on these weights, `source` says where they are from; `samples` is 0 if unknown.
    """

    samples: int
    sets: Mapping[ModalitySet, float]
    source: str = ""


@dataclass(frozen=True)
class ModelPackage:
    """A parsed and checked `model.toml`. `samples`, `sources` and `train` name modules of the folder, or are None.

    With `random_weights` the networks are made under a fixed seed, and `weights` is not read. `parameters` are for
    the package's own modules.
    """

    folder: Path
    name: str
    version: str
    description: str
    metric: str
    modalities: Mapping[str, ModalitySpec]
    fusion: str
    output: OutputSpec
    weights: Path
    accuracy_file: Path
    default_min_accuracy: float | None
    samples: str | None
    sources: str | None
    train: str | None
    random_weights: bool
    serve_by_default: bool
    parameters: Mapping[str, float]

    @cached_property
    def accuracy(self) -> Accuracy:
        """The accuracies of this package's weights, or those that stand in for them.

        Raises:
            PackageError: the file is missing, malformed, lacks a set, or was measured on other weights.
        """
        return _load_accuracy(self)

    def load_module(self, name: str) -> ModuleType:
        """Imports a module of the folder as `mosel_models.<model>.<name>`; relative imports work inside it.

        Raises:
            PackageError: there is no such file.
        """
        return _import(self.name, self.folder, name)

    def load_attribute(self, path: str) -> Any:
        """Imports `module:Attribute`.

        Raises:
            PackageError: the module or the attribute does not exist.
        """
        module_name, _, attribute = path.partition(":")
        module = self.load_module(module_name)
        if not hasattr(module, attribute):
            raise PackageError(
                f"{self.folder / module_name}.py has no '{attribute}', which model.toml names as '{path}'"
            )
        return getattr(module, attribute)


def load_package(folder: Path) -> ModelPackage:
    """Reads and checks `folder/model.toml`; imports none of its code.

    Raises:
        PackageError: names the file, the key, what it holds and what was expected.
    """
    file = folder / "model.toml"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PackageError(f"{file}: no such file; a model package is a folder with a model.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PackageError(f"{file}: not valid TOML: {error}") from None
    root = _Table(file, "", content)
    modalities = {name: _modality(table) for name, table in root.tables("modalities")}
    output, fusion = root.table("output"), root.table("fusion")
    samples, train = root.optional_table("samples"), root.optional_table("train")
    parameters = root.optional_table("parameters")
    package = ModelPackage(
        folder=folder.resolve(),
        name=_identifier(root, "name"),
        version=root.text("version"),
        description=root.text("description", default=""),
        metric=root.text("metric", default="accuracy"),
        modalities=modalities,
        fusion=fusion.code_path("class"),
        output=OutputSpec(
            name=output.text("name", default="output"),
            dtype=output.dtype(default="FP32"),
            shape=output.shape("shape"),
            labels=output.texts("labels", default=()),
        ),
        weights=folder / root.text("weights", default="weights.safetensors"),
        accuracy_file=folder / root.text("accuracy", default="accuracy.json"),
        default_min_accuracy=root.fraction("default_min_accuracy"),
        samples=samples.text("module") if samples else None,
        sources=samples.text("sources", default="") or None if samples else None,
        train=train.text("module") if train else None,
        random_weights=root.flag("random_weights", default=False),
        serve_by_default=root.flag("serve_by_default", default=True),
        parameters=parameters.numbers() if parameters else {},
    )
    for table in (output, fusion, samples, train, root):
        if table:
            table.refuse_unknown()
    _check_output(file, package.output)
    if package.random_weights and "weights" in content:
        raise PackageError(
            f"{file}: key 'weights' holds {content['weights']!r}; expected no such key beside random_weights = true"
        )
    return package


def find_packages(models: Path, only: tuple[str, ...] = ()) -> dict[str, ModelPackage]:
    """Loads the packages in a folder of model folders, by name.

    Args:
        models: the folder of folders.
        only: names to load; if empty, all that are served by default.

    Raises:
        ConfigError: the folder is not there, holds no package, or lacks one of `only`.
        PackageError: a package is wrong, or two have the same name.
    """
    if not models.is_dir():
        raise ConfigError(f"models folder {models}: no such folder")
    packages: dict[str, ModelPackage] = {}
    for file in sorted(models.glob("*/model.toml")):
        if only and file.parent.name not in only:
            continue
        package = load_package(file.parent)
        if package.name != file.parent.name:
            raise PackageError(f"{file}: name is '{package.name}'; expected the folder's name, '{file.parent.name}'")
        if only or package.serve_by_default:
            packages[package.name] = package
    missing = [name for name in only if name not in packages]
    if missing or not packages:
        wanted = f"model '{missing[0]}'" if missing else "a model package (a folder with a model.toml) to serve"
        known = ", ".join(sorted(f.parent.name for f in models.glob("*/model.toml"))) or "none"
        raise ConfigError(f"models folder {models}: {wanted} is not there; found: {known}")
    return packages


class _Table:
    """A TOML table that names file and key in every complaint, and knows which keys were asked for."""

    def __init__(self, file: Path, path: str, content: Mapping[str, Any]) -> None:
        self._file, self._path, self._content = file, path, content
        self._asked: set[str] = set()

    def _get(self, key: str, kind: type | tuple[type, ...], expected: str, default: Any) -> Any:
        self._asked.add(key)
        value = self._content.get(key, default)
        if value is None or isinstance(value, bool) or not isinstance(value, kind):
            found = f"holds {value!r}" if key in self._content else "is missing"
            raise PackageError(f"{self._file}: key '{self._path}{key}' {found}; expected {expected}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return str(self._get(key, str, "a string", default))

    def texts(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        values = tuple(self._get(key, (list, tuple), "a list of strings", default))
        if not all(isinstance(value, str) for value in values):
            raise PackageError(
                f"{self._file}: key '{self._path}{key}' holds {list(values)!r}; expected a list of strings"
            )
        return values

    def fraction(self, key: str) -> float | None:
        if key not in self._content:
            return None
        value = float(self._get(key, (int, float), "a number from 0 to 1", None))
        if not 0 <= value <= 1:
            raise PackageError(f"{self._file}: key '{self._path}{key}' holds {value}; expected a number from 0 to 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        self._asked.add(key)
        value = self._content.get(key, default)
        if not isinstance(value, bool):
            raise PackageError(f"{self._file}: key '{self._path}{key}' holds {value!r}; expected true or false")
        return value

    def numbers(self) -> dict[str, float]:
        return {key: float(self._get(key, (int, float), "a number", None)) for key in self._content}

    def shape(self, key: str) -> tuple[int, ...]:
        expected = "a list of positive integers, such as [28, 28]"
        values = tuple(self._get(key, list, expected, None))
        if not all(type(value) is int and value > 0 for value in values):
            raise PackageError(f"{self._file}: key '{self._path}{key}' holds {list(values)!r}; expected {expected}")
        return values

    def dtype(self, default: str | None = None) -> str:
        name = self.text("dtype", default)
        if name not in DTYPES:
            raise PackageError(
                f"{self._file}: key '{self._path}dtype' holds '{name}'; expected one of {', '.join(DTYPES)}"
            )
        return name

    def code_path(self, key: str) -> str:
        path = self.text(key)
        module, _, attribute = path.partition(":")
        if not (module.isidentifier() and attribute.isidentifier()):
            raise PackageError(f"{self._file}: key '{self._path}{key}' holds '{path}'; expected 'module:Class'")
        return path

    def table(self, key: str) -> "_Table":
        return _Table(self._file, f"{self._path}{key}.", self._get(key, dict, f"a table [{self._path}{key}]", None))

    def optional_table(self, key: str) -> "_Table | None":
        return self.table(key) if key in self._content else None

    def tables(self, key: str) -> list[tuple[str, "_Table"]]:
        outer = self.table(key)
        if not outer._content:
            raise PackageError(f"{self._file}: key '{key}' holds no modality; expected at least one [{key}.<name>]")
        for name in outer._content:
            if not name.isidentifier() or name == "fusion":
                raise PackageError(
                    f"{self._file}: modality name '{name}' in '{key}'; expected letters, digits and _, and not 'fusion'"
                )
        return [(name, outer.table(name)) for name in outer._content]

    def refuse_unknown(self) -> None:
        unknown = sorted(set(self._content) - self._asked)
        if unknown:
            known = ", ".join(sorted(self._asked))
            raise PackageError(f"{self._file}: key '{self._path}{unknown[0]}' is unknown; expected one of: {known}")


def _modality(table: _Table) -> ModalitySpec:
    spec = ModalitySpec(
        dtype=table.dtype(),
        shape=table.shape("shape"),
        encoder=table.code_path("encoder"),
        embedding=table.shape("embedding"),
    )
    table.refuse_unknown()
    return spec


def _identifier(root: _Table, key: str) -> str:
    value = root.text(key)
    if not value.isidentifier():
        raise PackageError(f"{root._file}: key '{key}' holds '{value}'; expected letters, digits and _")
    return value


def _check_output(file: Path, output: OutputSpec) -> None:
    if output.dtype == "BF16":
        raise PackageError(
            f"{file}: key 'output.dtype' holds 'BF16'; expected a type that callers can hold, such as FP32"
        )
    if output.labels and len(output.shape) != 1:
        raise PackageError(f"{file}: key 'output.shape' holds {list(output.shape)}; expected one dimension with labels")
    if output.labels and len(output.labels) != output.shape[0]:
        raise PackageError(
            f"{file}: key 'output.labels' holds {len(output.labels)} labels; "
            f"expected {output.shape[0]}, the dimension of output.shape"
        )


def _load_accuracy(package: ModelPackage) -> Accuracy:
    file = package.accuracy_file
    hint = "write it with mosel.training.write_accuracy"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        samples = int(content["validation"]["samples"])
        sets = {parse_set(key): float(value) for key, value in content["validation"]["sets"].items()}
        source = str(content.get("source", ""))
        measured_on = None if package.random_weights else str(content["weights_sha256"])
    except FileNotFoundError:
        raise PackageError(f"{file}: no such file; {hint}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageError(
            f"{file}: {type(error).__name__} {error}; expected what mosel.training writes; {hint}"
        ) from None
    expected = subsets(package.modalities)
    if wrong := sorted(map(format_set, {*expected} ^ sets.keys())):
        raise PackageError(
            f"{file}: key 'validation.sets.{wrong[0]}' is {'unknown' if parse_set(wrong[0]) in sets else 'missing'}; "
            f"expected every set: {', '.join(map(format_set, expected))}"
        )
    if any(not 0 <= value <= 1 for value in sets.values()):
        raise PackageError(f"{file}: key 'validation.sets' holds a number outside 0 to 1")
    if measured_on is not None and measured_on != file_sha256(package.weights):
        raise PackageError(
            f"{file}: key 'weights_sha256' is not the hash of {package.weights.name}: measure again; {hint}"
        )
    return Accuracy(samples=samples, sets=sets, source=source)


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        PackageError: the file is not there.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise PackageError(f"{file}: no such file; expected the model's weights as safetensors") from None


def _import(model: str, folder: Path, module: str) -> ModuleType:
    """Imports by path, without __init__.py: the parent package gets the folder as its search path."""
    qualified = f"{_NAMESPACE}.{model}.{module}"
    for name, path in ((_NAMESPACE, []), (f"{_NAMESPACE}.{model}", [str(folder)])):
        parent = sys.modules.get(name)
        if parent is None or list(parent.__path__) != path:
            parent = ModuleType(name)
            parent.__path__ = path
            sys.modules[name] = parent
            for stale in [key for key in sys.modules if path and key.startswith(f"{name}.")]:
                del sys.modules[stale]
    if not module.isidentifier() or importlib.util.find_spec(qualified) is None:
        raise PackageError(f"{folder / module}.py: no such file, but model.toml of '{model}' names it")
    try:
        return importlib.import_module(qualified)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PackageError(f"{folder / module}.py cannot be imported: {reason}") from error
