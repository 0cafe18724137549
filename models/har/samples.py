"""Labelled windows of the reference model `har`, cut from the prepared file `hapt.npz`.

A window is 128 samples (2.56 s at 50 Hz), a new one starts every 64, and it is kept when all of it has one of the six
labels. The splits are by person: the nine test people are those of UCI HAR's own test set, training has all others.
Nobody is left to calibrate on: `train.py` makes the calibration rows, with networks that have not seen the person.
"""

import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.data.samples import Samples
from mosel.errors import DatasetError, NoSuchSplit

LABELS = ("walk", "upstairs", "downstairs", "sit", "stand", "lie")
TEST_PEOPLE = (2, 4, 9, 10, 12, 13, 18, 20, 24)
SPLITS = ("train", "test")

_WINDOW, _STEP = 128, 64
_UNITS_PER_G = 720
_RAD_PER_S_PER_UNIT = 0.000305432619  # 0.0175 degrees per second
_QUARTERS = 4


def load(data: Path, split: str) -> Samples:
    """Cut the windows of one split.

    Args:
        data: the folder that holds `hapt.npz`.
        split: `train` or `test`.

    Returns:
        Payloads `acc` FP32 [N, 128, 3] in g, `gyro` FP32 [N, 128, 3] in rad/s and `motion` FP32 [N, 4, 4] in g
        (see `summarise`); labels are indices into `LABELS`; groups by person.

    Raises:
        DatasetError: there is no such split, or the file is not there or not what was expected.
    """
    if split not in SPLITS:
        raise NoSuchSplit(
            f"split '{split}': expected one of {', '.join(SPLITS)}; `mosel train har` makes the calibration rows"
        )
    arrays = _read(data / "hapt.npz")
    starts, labels = _windows(arrays["label"], arrays["experiment"])
    person = arrays["user"][starts].astype(np.int64)
    keep = np.isin(person, TEST_PEOPLE) == (split == "test")
    rows = starts[keep, None] + np.arange(_WINDOW)
    acc = arrays["acc"][rows].astype(np.float32) / np.float32(_UNITS_PER_G)
    gyro = arrays["gyro"][rows].astype(np.float32) * np.float32(_RAD_PER_S_PER_UNIT)
    return Samples({"acc": acc, "gyro": gyro, "motion": summarise(acc)}, labels[keep], {"person": person[keep]})


def summarise(acc: NDArray[np.float32]) -> NDArray[np.float32]:
    """What `motion` is: the magnitude of the acceleration, quarter by quarter of the window.

    The magnitude does not depend on how the phone is turned, and 64 bytes say how hard and how evenly somebody moves.

    Args:
        acc: windows of acceleration, [N, 128, 3] in g.

    Returns:
        [N, 4 quarters, (mean, standard deviation, least, greatest)] in g.
    """
    magnitude = np.sqrt(np.square(acc).sum(-1)).reshape(len(acc), _QUARTERS, -1)
    numbers = (magnitude.mean(-1), magnitude.std(-1), magnitude.min(-1), magnitude.max(-1))
    return np.stack(numbers, axis=-1).astype(np.float32)


def _read(file: Path) -> dict[str, NDArray[Any]]:
    names = ("acc", "gyro", "label", "user", "experiment")
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except FileNotFoundError:
        raise DatasetError(f"{file}: no such file; `mosel data get har` fetches it") from None
    except (OSError, ValueError, AttributeError, KeyError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{file}: {error}; expected the arrays {', '.join(names)}") from None


def _windows(labels: NDArray[np.int8], recording: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the kept windows start, and their labels counted from 0. No window spans two recordings."""
    edges = [0, *(np.flatnonzero(np.diff(recording.astype(np.int64))) + 1).tolist(), len(recording)]
    spans = itertools.pairwise(edges)
    starts = np.concatenate([np.arange(first, end - _WINDOW + 1, _STEP) for first, end in spans])
    inside = labels[starts[:, None] + np.arange(_WINDOW)]
    first = inside[:, 0]
    kept = (inside == first[:, None]).all(1) & (first >= 1) & (first <= len(LABELS))
    return starts[kept], first[kept].astype(np.int64) - 1
