"""Samples of a model: labelled ones, as its `samples` module hands them out, and made-up ones."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.errors import DatasetError
from mosel.tensors import DTYPES


@dataclass(frozen=True)
class Samples:
    """N labelled items.

    Args:
        payloads: one array per modality, [N, *shape], in the dtype that model.toml states.
        labels: int64 [N], the index of the right class.
        groups: by name, such as "person": int64 [N], which group an item belongs to. Items of the same group are alike
            (same person, same recording), so that many of them tell little more than one.
        certify: bool [N], the items that certify; the others choose rules. None: nothing is said.

    Raises:
        DatasetError: there is no modality, or the arrays differ in N.
    """

    payloads: dict[str, NDArray[Any]]
    labels: NDArray[np.int64]
    groups: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    certify: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not self.payloads:
            raise DatasetError("samples: payloads is empty, expected one array per modality")
        if self.labels.ndim != 1 or self.labels.dtype != np.int64:
            raise DatasetError(f"samples: labels is {self.labels.dtype} {self.labels.shape}, expected int64 [N]")
        for modality, payload in self.payloads.items():
            if payload.ndim == 0 or len(payload) != len(self):
                raise DatasetError(f"samples: {modality} has shape {payload.shape}, expected {len(self)} rows")
        for name, group in self.groups.items():
            if group.shape != (len(self),) or not np.issubdtype(group.dtype, np.integer):
                raise DatasetError(f"samples: groups by {name} are {group.dtype} {group.shape}, expected integers [N]")
        if self.certify is not None and (self.certify.shape != (len(self),) or self.certify.dtype != np.bool_):
            raise DatasetError(f"samples: certify is {self.certify.dtype} {self.certify.shape}, expected bool [N]")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: slice | NDArray[np.int64]) -> "Samples":
        """The samples of some rows, in that order."""
        return Samples(
            payloads={modality: payload[rows] for modality, payload in self.payloads.items()},
            labels=self.labels[rows],
            groups={name: group[rows] for name, group in self.groups.items()},
            certify=None if self.certify is None else self.certify[rows],
        )


def load_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """All arrays of an `.npz` file; never objects.

    Raises:
        DatasetError: the file is missing or damaged.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, AttributeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(f"{file}: not a readable .npz file: {error}") from None


def example_rows(dtype: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    """Ordinary-looking numbers, the same ones each time: 0..1, bytes 0..255, other integers 0 and 1."""
    random, numpy_dtype = np.random.default_rng(0), DTYPES[dtype]
    if dtype == "BF16":  # the upper half of a float32's bits
        return (random.random(shape, np.float32).view(np.uint32) >> 16).astype(numpy_dtype)
    if np.issubdtype(numpy_dtype, np.floating):
        return random.uniform(0, 1, shape).astype(numpy_dtype)
    # Wider integers may be looked up in a table, of which only the first rows are sure to be there.
    return random.integers(0, 256 if dtype == "UINT8" else 2, shape).astype(numpy_dtype)
