"""Model packages: a folder with `model.toml`, the Python modules it names, weights and measured accuracies.

A package runs code: only trusted folders may be loaded.
"""

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from mosel.errors import ConfigError, ModelNotFound, PackageError
from mosel.modality import ModalitySet, format_set, parse_set, subsets
from mosel.packages.calibration import UNLABELLED, Calibration, read_calibration
from mosel.packages.content import CALIBRATION_FILE, content_digests, weights_file
from mosel.packages.manifest import MANIFEST, Manifest, ModalitySpec, OutputSpec
from mosel.packages.model_modules import import_module
from mosel.validation import explain

_ACCURACY_HINT = "write it with mosel.compute.training.write_accuracy"


@dataclass(frozen=True)
class StatedAccuracy:
    """Accuracy of each modality set, 0..1, measured on `samples` items of the validation split.

    Where the figures were not measured on this model, `source` says where they are from; `samples` is 0 if unknown.
    """

    samples: int
    sets: Mapping[ModalitySet, float]
    source: str = ""


def name_of(model: str) -> str:
    """The name in a model's id; a name is its own."""
    return model.partition("@")[0]


@dataclass(frozen=True)
class ModelPackage:
    """A parsed and checked `model.toml`. `samples`, `sources` and `train` name modules of the folder, or are None.

    With `random_weights` the networks are made under a fixed seed, and `weights` is not read. `parameters` are for
    the package's own modules. `content_hash` is a digest of every file that can change what is computed, and
    measurements name it; `code` is the same without the weights; `revision` is of the measurements, too.
    With `optimise` the networks may be served in another form whose numbers differ by at most `tolerance`, a share of
    the largest one.
    """

    folder: Path
    revision: str
    content_hash: str
    code: str
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
    max_accuracy_loss: float | None
    samples: str | None
    sources: str | None
    train: str | None
    random_weights: bool
    serve_by_default: bool
    parameters: Mapping[str, float]
    optimise: bool
    tolerance: float

    @property
    def id(self) -> str:
        """Names the model as these files have it, `digits@3f9a0c4e5d6b7a81`: what services load, and calls name."""
        return f"{self.name}@{self.revision}"

    def has_networks_of(self, other: "ModelPackage") -> bool:
        """Whether the networks of both are the same but for their weights, so that they take the same time."""
        return (self.code, self.optimise, self.tolerance) == (other.code, other.optimise, other.tolerance)

    def check_unchanged(self) -> None:
        """Checks that the files are still those that this was read from, and that its measurements are of them.

        Raises:
            PackageError: they are not.
        """
        if load_package(self.folder).revision != self.revision:
            raise PackageError(f"{self.folder}: the files changed while they were read; load the model again")
        _ = self.accuracy, self.calibration

    @cached_property
    def accuracy(self) -> StatedAccuracy:
        """The accuracies of this package, or those that stand in for them.

        Raises:
            PackageError: the file is missing, malformed, lacks a set, or was measured with other files.
        """
        return _load_accuracy(self)

    @cached_property
    def calibration(self) -> Calibration | None:
        """What the model answered on calibration rows; None if there are none.

        Nor are there any for other metrics than accuracy: guarantees are about answers that are right or wrong.

        Raises:
            PackageError: the file is damaged, or was measured with other files.
        """
        file = self.folder / CALIBRATION_FILE
        return _load_calibration(self, file) if self.metric == "accuracy" and file.exists() else None

    def load_module(self, name: str) -> ModuleType:
        """Imports a module of the folder as `mosel_models.<model>.<name>`; relative imports work inside it.

        Raises:
            PackageError: there is no such file.
        """
        return import_module(self.name, self.folder, name)

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


def load_package(folder: Path, weights: Path | None = None) -> ModelPackage:
    """Reads and checks `folder/model.toml`; imports none of its code.

    Args:
        folder: the package.
        weights: a file that takes the place of its weights.

    Raises:
        PackageError: names the file, the key, what it holds and what was expected.
    """
    file = folder / "model.toml"
    manifest, text = _read_manifest(file)
    accuracy_file = folder / manifest.accuracy
    weights = weights or folder / weights_file(manifest)
    content, code = content_digests(folder, manifest, weights)
    samples, train = manifest.samples, manifest.train
    return ModelPackage(
        folder=folder.resolve(),
        revision=_digest((content, text, accuracy_file, folder / CALIBRATION_FILE)),
        content_hash=content,
        code=code,
        name=manifest.name,
        version=manifest.version,
        description=manifest.description,
        metric=manifest.metric,
        modalities=manifest.modalities,
        fusion=manifest.fusion.path,
        output=manifest.output,
        weights=weights,
        accuracy_file=accuracy_file,
        default_min_accuracy=manifest.default_min_accuracy,
        max_accuracy_loss=manifest.max_accuracy_loss,
        samples=samples.module if samples else None,
        sources=samples.sources or None if samples else None,
        train=train.module if train else None,
        random_weights=manifest.random_weights,
        serve_by_default=manifest.serve_by_default,
        parameters=manifest.parameters,
        optimise=manifest.optimise,
        tolerance=manifest.tolerance,
    )


def _read_manifest(file: Path) -> tuple[Manifest, str]:
    """A checked `model.toml`, and the same as text."""
    try:
        text = file.read_text(encoding="utf-8")
        manifest = MANIFEST.validate_python(tomllib.loads(text))
    except FileNotFoundError:
        raise PackageError(f"{file}: no such file; a model package is a folder with a model.toml") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PackageError(f"{file}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise PackageError(f"{file}: {explain(error)}") from None
    _check_output(file, manifest.output)
    if manifest.random_weights and manifest.weights is not None:
        raise PackageError(
            f"{file}: key 'weights' holds {manifest.weights!r}; expected no such key beside random_weights = true"
        )
    return manifest, text


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


def find_package(models: Path, model: str) -> ModelPackage:
    """The package of a model, from a folder of model folders.

    Args:
        models: the folder of folders.
        model: its name, or its id: then the files must still be what the id stands for.

    Raises:
        ModelNotFound: there is no such package.
        PackageError: it is wrong, or the files are not what the id stands for.
    """
    name, _, revision = model.partition("@")
    try:
        package = find_packages(models, (name,))[name]
    except ConfigError as error:
        raise ModelNotFound(str(error)) from None
    if revision and package.revision != revision:
        raise PackageError(f"{package.folder}: the files are {package.id}; expected {model}")
    return package


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


def _load_accuracy(package: ModelPackage) -> StatedAccuracy:
    file = package.accuracy_file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        samples = int(content["validation"]["samples"])
        sets = {parse_set(key): float(value) for key, value in content["validation"]["sets"].items()}
        source = str(content.get("source", ""))
        measured_with = None if package.random_weights else str(content.get("content_hash", ""))
    except FileNotFoundError:
        raise PackageError(f"{file}: no such file; {_ACCURACY_HINT}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackageError(
            f"{file}: {type(error).__name__} {error}; expected what mosel.compute.training writes; {_ACCURACY_HINT}"
        ) from None
    expected = subsets(package.modalities)
    if wrong := sorted(map(format_set, {*expected} ^ sets.keys())):
        raise PackageError(
            f"{file}: key 'validation.sets.{wrong[0]}' is {'unknown' if parse_set(wrong[0]) in sets else 'missing'}; "
            f"expected every set: {', '.join(map(format_set, expected))}"
        )
    if any(not 0 <= value <= 1 for value in sets.values()):
        raise PackageError(f"{file}: key 'validation.sets' holds a number outside 0 to 1")
    if measured_with is not None:
        if not package.weights.is_file():
            raise PackageError(f"{package.weights}: no such file; expected the model's weights as safetensors")
        _check_measured_with(package, file, measured_with)
    return StatedAccuracy(samples=samples, sets=sets, source=source)


def _load_calibration(package: ModelPackage, file: Path) -> Calibration:
    calibration = read_calibration(file)
    _check_measured_with(package, file, calibration.content_hash)
    if {*calibration.sets} != {*subsets(package.modalities)} or len({*calibration.sets}) != len(calibration.sets):
        names = ", ".join(map(format_set, calibration.sets))
        raise PackageError(f"{file}: sets are {names}; expected each set of {format_set(package.modalities)} once")
    outputs = math.prod(package.output.shape)
    for name, values in {"answers": calibration.answers, "labels": calibration.labels}.items():
        least = UNLABELLED if name == "labels" else 0
        if values.size and not least <= values.min() <= values.max() < outputs:
            raise PackageError(
                f"{file}: {name} are {values.min()} to {values.max()}; expected {least} to {outputs - 1}, "
                f"as output.shape is {list(package.output.shape)}"
            )
    return calibration


def _check_measured_with(package: ModelPackage, file: Path, content_hash: str) -> None:
    """Checks that a measurement is of these files."""
    if content_hash == package.content_hash:
        return
    held = f"holds '{content_hash[:12]}...'" if content_hash else "is missing: an old format, or another"
    raise PackageError(
        f"{file}: not measured with the files of the package as they are: key 'content_hash' {held}; "
        f"expected '{package.content_hash[:12]}...'; `mosel calibrate {package.name}` measures again"
    )


def _digest(parts: Iterable[str | Path]) -> str:
    """16 hexadecimal digits for texts and the contents of files; one that is not there counts as empty."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part.read_bytes() if part.is_file() else b""
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]
