"""Items without labels, from a folder of `.npy` files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.data.samples import Samples
from mosel.errors import DatasetError
from mosel.packages.calibration import UNLABELLED
from mosel.packages.manifest import ModalitySpec
from mosel.tensors import DTYPES

GROUPS_FILE = "groups.npy"


def read_unlabelled(folder: Path, modalities: Mapping[str, ModalitySpec]) -> Samples:
    """Reads `<modality>.npy`, [N, *shape], for every modality, and `groups.npy`, int32 [N] or [N, C], if it is there.

    Payloads stay on disk until they are used.

    Raises:
        DatasetError: a file is missing, damaged, of another type or shape, or they differ in N.
    """
    payloads = {name: _payload(folder / f"{name}.npy", spec) for name, spec in modalities.items()}
    first, rows = next((name, len(payload)) for name, payload in payloads.items())
    for name, payload in payloads.items():
        if len(payload) != rows:
            raise DatasetError(f"{folder / name}.npy: {len(payload)} items; expected {rows}, as {first}.npy has")
    if not rows:
        raise DatasetError(f"{folder / first}.npy: no items; expected one at least")
    return Samples(payloads, np.full(rows, UNLABELLED, np.int64), _groups(folder / GROUPS_FILE, rows))


def _payload(file: Path, spec: ModalitySpec) -> NDArray[Any]:
    payload = _read(file)
    if payload.dtype != DTYPES[spec.dtype] or payload.shape[1:] != tuple(spec.shape):
        raise DatasetError(
            f"{file}: {payload.dtype} {list(payload.shape)}; expected {DTYPES[spec.dtype]} {['items', *spec.shape]}"
        )
    return payload


def _groups(file: Path, rows: int) -> dict[str, NDArray[np.int64]]:
    if not file.exists():
        return {}
    groups = _read(file)
    if groups.dtype != np.int32 or groups.ndim not in (1, 2) or len(groups) != rows:
        raise DatasetError(f"{file}: {groups.dtype} {list(groups.shape)}; expected int32 [{rows}] or [{rows}, C]")
    columns = groups.reshape(rows, -1).T.astype(np.int64)
    return {f"column {number} of {GROUPS_FILE}": column for number, column in enumerate(columns)}


def _read(file: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
        return array
    except FileNotFoundError:
        raise DatasetError(f"{file}: no such file; expected an array [items, ...]") from None
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{file}: not a readable .npy file: {error}") from None
