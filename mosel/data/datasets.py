"""Find the labelled recordings of a model, or fetch them from their publishers.

A model package says in its `sources` module what its dataset is: `DATASET`, a `Dataset`. Looked in, in this order: the
folder that the caller names, the folder in the environment variable MOSEL_DATA, the user's cache; `get` then asks the
publishers and fills the cache. Whatever the place, a file counts only if it is the prepared file, bit for bit, or holds
the same arrays.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray
from rich.progress import Progress

from mosel.data.downloads import Downloads
from mosel.data.samples import load_arrays
from mosel.errors import DatasetError
from mosel.packages.content import file_sha256
from mosel.packages.model_package import ModelPackage

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class DataFile:
    """One `.npz` file of a dataset.

    Attributes:
        name: file name.
        sha256: of the prepared file, hexadecimal.
        content_sha256: of its arrays (see `content_sha256`): a rebuilt file differs in the zip's time stamps at least.
        build: makes the arrays from what the publishers offer.
        accepts: for what cannot be rebuilt bit for bit: whether arrays are as good as the prepared ones.
    """

    name: str
    sha256: str
    content_sha256: str
    build: Callable[[Downloads], Arrays]
    accepts: Callable[[Arrays], bool] | None = None


@dataclass(frozen=True)
class Dataset:
    """A folder of files.

    Attributes:
        name: of the folder.
        licence: one line: who made it, under which licence.
        publishers: one line: where it is published.
        files: all of them are needed.
    """

    name: str
    licence: str
    publishers: str
    files: tuple[DataFile, ...]


@dataclass(frozen=True)
class FoundData:
    """A folder with all files of a dataset, checked; `origin` says in words how it was found."""

    folder: Path
    origin: str


def describe(package: ModelPackage) -> Dataset:
    """The dataset of a model.

    Raises:
        DatasetError: its model.toml names no sources, or they define no `DATASET`.
    """
    if package.sources is None:
        raise DatasetError(
            f"model '{package.name}' has no key 'samples.sources' in model.toml, so its recordings have to be named "
            "with --data"
        )
    dataset = getattr(package.load_module(package.sources), "DATASET", None)
    if not isinstance(dataset, Dataset):
        raise DatasetError(f"{package.folder / package.sources}.py: DATASET is {dataset!r}; expected a Dataset")
    return dataset


def find(package: ModelPackage, data: Path | None = None, cache: Path | None = None) -> FoundData:
    """Find the dataset of a model on this machine.

    Args:
        package: the model. If it names no sources, `data` is taken as it is.
        data: the folder of the dataset, or a folder that holds it; if given, no other place is looked in.
        cache: the folder that `get` fills; by default `data` in the user's cache.

    Raises:
        DatasetError: no place has it, or a file is damaged.
    """
    if package.sources is None and data is not None:
        if not data.is_dir():
            raise DatasetError(f"--data {data}: no such folder")
        return FoundData(data, f"--data {data}")
    dataset = describe(package)
    places = _places(dataset, data)
    if data is None:
        places.append((_cache(cache) / dataset.name, f"the cache {_cache(cache)}"))
    found = _search(dataset, places)
    if found is None:
        looked = ", ".join(dict.fromkeys(origin for _, origin in places))
        names = ", ".join(file.name for file in dataset.files)
        raise DatasetError(
            f"no samples for model '{package.name}': no folder '{dataset.name}' with {names} in {looked}; "
            f"fetch it with `mosel data get {package.name}`"
        )
    return found


def get(
    package: ModelPackage, data: Path | None = None, cache: Path | None = None, progress: Progress | None = None
) -> FoundData:
    """Find the dataset of a model, or fetch it into the cache.

    A file appears in the cache when it is complete and checked, never before; what is there and right is kept.

    Args:
        package: the model.
        data: as for `find`; if given, nothing is fetched.
        cache: as for `find`.
        progress: shows the downloads.

    Raises:
        DatasetError: a source is unreachable (said within 10 s), or gave something else than expected.
    """
    if data is not None or package.sources is None:
        return find(package, data, cache)
    dataset = describe(package)
    if found := _search(dataset, _places(dataset, None)):
        return found
    folder = _cache(cache) / dataset.name
    missing = [file for file in dataset.files if not _is_right(folder / file.name, file)]
    if not missing:
        return FoundData(folder, f"the cache {_cache(cache)}")
    _cache(cache).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=_cache(cache)) as scratch:
        for file in missing:
            _rebuild(file, folder, Path(scratch), progress or Progress(disable=True))
    return FoundData(folder, f"fetched from {dataset.publishers} to {folder}")


def content_sha256(arrays: Arrays) -> str:
    """The SHA-256 over the arrays in the order of their names: name, dtype, shape, then the bytes in C order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _places(dataset: Dataset, data: Path | None) -> list[tuple[Path, str]]:
    """Folders to look in before the cache, each with what it is called in messages."""
    if data is not None:
        return [(data / dataset.name, f"--data {data}"), (data, f"--data {data}")]
    if named := os.environ.get("MOSEL_DATA"):
        return [(Path(named) / dataset.name, f"MOSEL_DATA={named}"), (Path(named), f"MOSEL_DATA={named}")]
    return []


def _search(dataset: Dataset, places: list[tuple[Path, str]]) -> FoundData | None:
    """The first place that has all files; raises DatasetError if one of them is damaged there."""
    for folder, origin in places:
        if all((folder / file.name).is_file() for file in dataset.files):
            for file in dataset.files:
                _check(folder / file.name, file)
            return FoundData(folder, origin)
    return None


def _cache(cache: Path | None) -> Path:
    return cache or Path(platformdirs.user_cache_dir("mosel")) / "data"


def _is_right(path: Path, file: DataFile) -> bool:
    try:
        if path.is_file():
            _check(path, file)
            return True
    except DatasetError:
        pass  # damaged: it will be replaced
    return False


def _check(path: Path, file: DataFile) -> None:
    if file_sha256(path) == file.sha256:
        return
    _check_arrays(str(path), load_arrays(path), file)


def _check_arrays(what: str, arrays: Arrays, file: DataFile) -> None:
    found = content_sha256(arrays)
    if found == file.content_sha256 or (file.accepts is not None and file.accepts(arrays)):
        return
    raise DatasetError(
        f"{what}: damaged or another version: its arrays have SHA-256 {found[:12]}..., "
        f"expected {file.content_sha256[:12]}..."
    )


def _rebuild(file: DataFile, folder: Path, scratch: Path, progress: Progress) -> None:
    arrays = file.build(Downloads(scratch, progress))
    _check_arrays(f"{file.name} as rebuilt from its publishers", arrays, file)
    partial = scratch / file.name
    with partial.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    folder.mkdir(exist_ok=True)
    partial.replace(folder / file.name)
