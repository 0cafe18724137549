"""What a package computes with, as digests: a measurement names the files that it was made with by them."""

import hashlib
import json
import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from mosel.errors import PackageError
from mosel.packages.manifest import MANIFEST, Manifest

CALIBRATION_FILE = "calibration.npz"
_WRITTEN_BY_MEASURING = frozenset({CALIBRATION_FILE, "report.json", "report.md"})
# Keys of model.toml that operators may change without measuring again: nothing is computed differently, but for what
# `tolerance` allows.
_OF_OPERATORS = frozenset(
    {"description", "default_min_accuracy", "max_accuracy_loss", "serve_by_default", "optimise", "tolerance"}
)


def content_digests(folder: Path, manifest: Manifest, weights: Path) -> tuple[str, str]:
    """Digests of everything that can change what a package computes, with the weights and without, in hexadecimal.

    That is every file of the folder by its relative path, and what model.toml says. Left out are what measuring
    writes, hidden files, caches and half-written ones, Markdown, and the keys of model.toml that are the operator's.

    Args:
        folder: the package.
        manifest: its model.toml.
        weights: the file that its networks are filled with; passed over if they keep random weights.

    Raises:
        PackageError: a file cannot be read.
    """
    says = MANIFEST.dump_python(manifest, mode="json", exclude_defaults=True)
    says = {key: value for key, value in says.items() if key not in _OF_OPERATORS}
    digest = hashlib.sha256(json.dumps(says, sort_keys=True).encode())
    for name in _files(folder, manifest):
        digest.update(f"\n{file_sha256(folder / name)} {name}".encode(errors="surrogateescape"))
    code = digest.hexdigest()
    if not manifest.random_weights and weights.is_file():
        digest.update(f"\n{file_sha256(weights)} weights".encode())
    return digest.hexdigest(), code


def weights_file(manifest: Manifest) -> str:
    """Where the weights are, relative to the folder."""
    return manifest.weights or "weights.safetensors"


def _files(folder: Path, manifest: Manifest) -> Iterator[str]:
    apart = {"model.toml", os.path.normpath(manifest.accuracy), *_WRITTEN_BY_MEASURING}
    if not manifest.random_weights:
        apart.add(os.path.normpath(weights_file(manifest)))
    # Unlike that of Path, this follows links to folders, and passes hidden names over.
    for name in sorted(glob("**", root_dir=folder, recursive=True)):  # noqa: PTH207
        passed_over = name in apart or name.endswith((".pyc", ".partial", ".md")) or "__pycache__" in Path(name).parts
        if not passed_over and (folder / name).is_file():
            yield name


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        PackageError: the file cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise PackageError(f"{file}: {error.strerror}; expected a file that can be read") from None
