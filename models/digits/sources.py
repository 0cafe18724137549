"""Where the recordings of `digits` come from, and how the publishers' files become its five `.npz` files.

`rows.npz` is this project's own table (CC0): which published recording stands in which row, and which rows make an
item. With it everything is rebuilt to the same arrays, except the noise: the publisher's clips are compressed and have
to be resampled, which no two programs do bit for bit alike, so rebuilt clips are compared by their loudness over time.
"""

import csv
import gzip
import importlib
import io
import tarfile
import wave
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosel.data.datasets import Arrays, DataFile, Dataset
from mosel.data.downloads import Downloads
from mosel.data.samples import load_arrays
from mosel.errors import DatasetError

MNIST = ("https://yann.lecun.com/exdb/mnist/{}.gz", "https://ossci-datasets.s3.amazonaws.com/mnist/{}.gz")
FSDD = ("https://github.com/Jakobovski/free-spoken-digit-dataset/archive/26eb9aaf.tar.gz",)
PENDIGITS = ("https://archive.ics.uci.edu/ml/machine-learning-databases/pendigits/pendigits.{}",)
ESC10 = ("https://github.com/karolpiczak/ESC-10/archive/553c8f1743b9dba6b282e1323c3ca8fa76923448.tar.gz",)

_ROWS = Path(__file__).with_name("rows.npz")
_SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
_RATE_HZ, _NOISE_SAMPLES, _LOUDNESS_STEPS = 8_000, 16_000, 40
_LEAST_COSINE = 0.97


def build_images(downloads: Downloads) -> dict[str, NDArray[Any]]:
    """The MNIST images that are used; the PCA was computed from all 60,000 training images."""
    rows = load_arrays(_ROWS)
    images = [_idx(downloads.url(*_at(MNIST, f"{part}-images-idx3-ubyte"))) for part in ("train", "t10k")]
    labels = [_idx(downloads.url(*_at(MNIST, f"{part}-labels-idx1-ubyte"))) for part in ("train", "t10k")]
    used = rows["mnist_index"]
    return {
        "image": _take(np.concatenate(images), used, "MNIST images"),
        "label": _take(np.concatenate(labels), used, "MNIST labels"),
        **{name: rows[name] for name in ("mnist_index", "pca_mean", "pca_components")},
    }


def build_speech(downloads: Downloads) -> dict[str, NDArray[Any]]:
    """All takes of FSDD end to end, in the order of their file names."""
    takes = [f"{digit}_{speaker}_{take}" for digit in range(10) for speaker in _SPEAKERS for take in range(50)]
    takes.sort(key=lambda take: (take.rsplit("_", 1)[0], take.rsplit("_", 1)[1] + ".wav"))
    found = _members(downloads.url(*FSDD), [f"{take}.wav" for take in takes])
    pcm = [_wav(found[f"{take}.wav"]) for take in takes]
    digit, speaker, take = zip(*(name.split("_") for name in takes), strict=True)
    return {
        "pcm": np.concatenate(pcm),
        "offset": np.cumsum([0, *map(len, pcm)]).astype(np.int32),
        "digit": np.array(digit, dtype=np.uint8),
        "speaker": np.array([_SPEAKERS.index(name) for name in speaker], dtype=np.uint8),
        "take": np.array(take, dtype=np.uint8),
    }


def build_pen(downloads: Downloads) -> dict[str, NDArray[Any]]:
    """The rows of the UCI files, train writers first: 8 points (x, y), then the digit."""
    parts = []
    for part in ("tra", "tes"):
        file = downloads.url(*_at(PENDIGITS, part))
        try:
            lines = list(csv.reader(file.read_text(encoding="ascii").splitlines()))
            parts.append(np.array(lines, dtype=np.float64).astype(np.uint8))
        except ValueError as error:
            raise DatasetError(f"pendigits.{part}: {error}") from None
    table = np.concatenate(parts)
    return {
        "points": table[:, :16].reshape(-1, 8, 2),
        "label": table[:, 16],
        "n_train": np.array(len(parts[0]), np.int32),
    }


def build_noise(downloads: Downloads) -> dict[str, NDArray[Any]]:
    """Two seconds of each ESC-10 clip that is used, at 8 kHz, with a peak of 0.9. Needs the package soundfile."""
    try:
        soundfile = importlib.import_module("soundfile")
    except (ImportError, OSError):
        raise DatasetError("noise.npz: ESC-10's Ogg files need a decoder: `pip install soundfile`") from None
    rows = load_arrays(_ROWS)
    clips = [f"{clip}.ogg" for clip in rows["noise_clip"].tolist()]
    found = _members(downloads.url(*ESC10), clips)
    pcm = []
    for clip, first in zip(clips, rows["noise_first"].tolist(), strict=True):
        samples, rate = soundfile.read(io.BytesIO(found[clip]), dtype="float64", always_2d=True)
        cut = resample(samples.mean(1), rate, _RATE_HZ)[first : first + _NOISE_SAMPLES]
        if len(cut) < _NOISE_SAMPLES:
            raise DatasetError(f"{clip}: ends {_NOISE_SAMPLES - len(cut)} samples early")
        pcm.append(np.round(cut * (0.9 * 32_767 / np.abs(cut).max())).astype(np.int16))
    return {"pcm": np.stack(pcm), "fold": rows["noise_fold"], "cls": rows["noise_cls"]}


def accepts_noise(arrays: Arrays) -> bool:
    """Whether every clip is as loud as the prepared one, moment by moment (cosine of the 50 ms RMS values)."""
    rows = load_arrays(_ROWS)
    known, pcm = rows["noise_loudness"].astype(np.float64), arrays.get("pcm")
    if set(arrays) != {"pcm", "fold", "cls"} or pcm is None or pcm.shape != (len(known), _NOISE_SAMPLES):
        return False
    found = loudness(pcm)
    same = all(np.array_equal(arrays[name], rows[f"noise_{name}"]) for name in ("fold", "cls"))
    cosine = (found * known).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(known, axis=1) + 1e-12)
    return bool(same and pcm.dtype == np.int16 and (cosine > _LEAST_COSINE).all())


def loudness(pcm: NDArray[np.int16]) -> NDArray[np.float64]:
    """RMS of each 50 ms of clips [N, 16000], over the clip's loudest 50 ms: [N, 40]."""
    power = np.square(pcm.astype(np.float64)).reshape(len(pcm), _LOUDNESS_STEPS, -1).mean(-1)
    rms = np.sqrt(power)
    scaled: NDArray[np.float64] = rms / np.maximum(rms.max(1, keepdims=True), 1e-12)
    return scaled


def resample(samples: NDArray[np.float64], rate_hz: int, new_rate_hz: int) -> NDArray[np.float64]:
    """Resamples to a lower rate by cutting the spectrum off at the new Nyquist frequency."""
    length = round(len(samples) * new_rate_hz / rate_hz)
    return np.fft.irfft(np.fft.rfft(samples)[: length // 2 + 1], length) * (length / len(samples))


def build_pairs(_: Downloads) -> dict[str, NDArray[Any]]:
    """The table of items, which is ours: nothing is fetched."""
    splits = ("train_", "val_", "test_")
    return {name: array for name, array in load_arrays(_ROWS).items() if name.startswith(splits)}


def _at(addresses: tuple[str, ...], file: str) -> list[str]:
    return [address.format(file) for address in addresses]


def _take(array: NDArray[Any], used: NDArray[np.int32], what: str) -> NDArray[Any]:
    if len(array) != 70_000:
        raise DatasetError(f"{what}: {len(array)} rows; expected 70000")
    return array[used]


def _idx(file: Path) -> NDArray[np.uint8]:
    """An idx file, gzipped or not: two zero bytes, type (8 is uint8), rank, the dimensions big-endian, the values."""
    content = file.read_bytes()
    try:
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        if content[:3] != b"\0\0\x08":
            raise ValueError("no idx file of bytes")
        shape = np.frombuffer(content, ">u4", content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(tuple(shape.tolist()))
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise DatasetError(f"{file.name}: {error}") from None


def _members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Files of a tar archive by their base names, in whatever folder they lie; nothing is written to disk."""
    wanted, found = set(names), {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in wanted and (stream := tar.extractfile(member)) is not None:
                    found[name] = stream.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DatasetError(f"{archive.name}: {error}") from None
    if missing := sorted(wanted - set(found)):
        raise DatasetError(f"{archive.name}: lacks {len(missing)} of {len(wanted)} recordings, {missing[0]} for one")
    return found


def _wav(content: bytes) -> NDArray[np.int16]:
    try:
        with wave.open(io.BytesIO(content)) as file:
            if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, _RATE_HZ):
                raise wave.Error("not mono, 16 bit, 8 kHz")
            return np.frombuffer(file.readframes(file.getnframes()), "<i2")
    except (wave.Error, EOFError) as error:
        raise DatasetError(f"a recording of FSDD: {error}") from None


DATASET = Dataset(
    name="digits3",
    licence="MNIST, FSDD (CC BY-SA 4.0), UCI Pen-Based Digits (CC BY 4.0), ESC-10 (CC BY 3.0); row table CC0",
    publishers="MNIST, FSDD, UCI and ESC-10",
    files=(  # noise first: a missing decoder is said before anything is fetched
        DataFile(
            "noise.npz",
            "933430ada2cabbdcccf9e87e0fb4f505c70c0f31da3a9f1d1b8893b7b56841ee",
            "9e7db4a98cb07d1bb7762b6e5163346bc82d91d68dc6f3875d0cd1b0856eb03d",
            build_noise,
            accepts_noise,
        ),
        DataFile(
            "images.npz",
            "ab07689c5248a60627b168cdfdff1541cdbe0636ed92d9f2c8ca2c24a37aa2e0",
            "7314f9b47d6a00138862b17300d1a599deb2e7c4bfedf1950a270f8f32b6423a",
            build_images,
        ),
        DataFile(
            "speech.npz",
            "db621f807e007dc447d42353b25e65adfb67dae9dc937cefe321c7778800006b",
            "e79a99c28dd81681889986dc9038f64a4052e4f657ab57309d72fc0f27c25b95",
            build_speech,
        ),
        DataFile(
            "pen.npz",
            "4df1a495028a22a278c60e4eeb77cda4c2cf884ecae80e5ba2daf5e8bfe6c563",
            "1e127e4f09b73bd2ef6029cf8f9221f7b26abc82a78c5d4d8cdbbc7ef198406e",
            build_pen,
        ),
        DataFile(
            "pairs.npz",
            "ba6d5043a63b0024233c23fba87876248a08e0acf53462f48dd72fe67b24b9a1",
            "22e028bbe62ddde038a2970717d3d2d7628a1582e98b7359ae6e60d1b96c1896",
            build_pairs,
        ),
    ),
)
