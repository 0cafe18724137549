"""Calibration rows (`calibration.npz`): what a model answered on items, labelled or not, for every modality set."""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.errors import PackageError
from mosel.modality import ModalitySet, format_set, parse_set

UNLABELLED = -1
_DESIGN_SHARE, _ROLES_SEED = 0.2, 0
_ARRAYS = ("answers", "certify", "confidence", "content_hash", "group_names", "groups", "labels", "sets", "source")


@dataclass(frozen=True, eq=False)
class Calibration:
    """N items, none of which a weight was fitted to, and what the model made of them.

    Attributes:
        content_hash: of the package that was measured (`ModelPackage.content_hash`).
        sets: the S modality sets, every non-empty one of the model's modalities.
        answers: int32 [N, S], the index of the largest output.
        confidence: float32 [N, S], that output.
        labels: int32 [N], the right answer, or `UNLABELLED`.
        groups: int32 [N, C], for each grouping, which group an item belongs to; items of the same group are alike.
        group_names: what each grouping is by, such as "person".
        certify: bool [N], whether an item certifies; the others are design rows, with which rules are chosen.
        source: where the items are from, in words.
    """

    content_hash: str
    sets: Sequence[ModalitySet]
    answers: NDArray[np.int32]
    confidence: NDArray[np.float32]
    labels: NDArray[np.int32]
    groups: NDArray[np.int32]
    group_names: Sequence[str]
    certify: NDArray[np.bool_]
    source: str = ""

    def __post_init__(self) -> None:
        rows, sets = len(self.labels), len(self.sets)
        expected = {
            "answers": (np.int32, (rows, sets)),
            "confidence": (np.float32, (rows, sets)),
            "labels": (np.int32, (rows,)),
            "groups": (np.int32, (rows, len(self.group_names))),
            "certify": (np.bool_, (rows,)),
        }
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != shape:
                raise ValueError(
                    f"{name} is {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {list(shape)}"
                )

    @property
    def is_labelled(self) -> bool:
        """Whether the right answer is known of every item."""
        return bool((self.labels != UNLABELLED).all())


def drawn_roles(groups: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which items certify, where nothing says so: all but about a fifth, by whole groups of the first grouping.

    Args:
        groups: int32 [N, C]; without groupings, every item is a group of its own.

    Returns:
        bool [N], the same each time. Of two groups or more at least one chooses and one certifies.
    """
    group = groups[:, 0] if groups.shape[1] else np.arange(len(groups))
    every = np.random.default_rng(_ROLES_SEED).permutation(np.unique(group))
    return ~np.isin(group, every[: max(round(_DESIGN_SHARE * len(every)), int(len(every) > 1))])


def save_calibration(file: Path, calibration: Calibration) -> None:
    """Writes calibration rows; a reader sees the old file or the new one, never a half."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            answers=calibration.answers,
            certify=calibration.certify,
            confidence=calibration.confidence,
            content_hash=np.array(calibration.content_hash),
            group_names=np.array(list(calibration.group_names), np.str_),
            groups=calibration.groups,
            labels=calibration.labels,
            sets=np.array(list(map(format_set, calibration.sets)), np.str_),
            source=np.array(calibration.source),
        )
    partial.replace(file)


def has_labels(file: Path) -> bool:
    """Whether there are labelled rows in a file, which nobody must lose unasked.

    Raises:
        PackageError: it is damaged.
    """
    return file.exists() and read_calibration(file).is_labelled


def read_calibration(file: Path) -> Calibration:
    """Reads what `save_calibration` wrote; never objects.

    Raises:
        PackageError: the file is damaged or holds something else.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays: dict[str, NDArray[Any]] = {name: archive[name] for name in _ARRAYS}
        return Calibration(
            content_hash=str(arrays["content_hash"]),
            sets=[parse_set(name) for name in arrays["sets"].tolist()],
            answers=arrays["answers"],
            confidence=arrays["confidence"],
            labels=arrays["labels"],
            groups=arrays["groups"],
            group_names=arrays["group_names"].tolist(),
            certify=arrays["certify"],
            source=str(arrays["source"]),
        )
    except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PackageError(f"{file}: {error}; expected calibration rows as `mosel calibrate` writes them") from None
