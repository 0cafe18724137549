"""What users install: the wheel's content, and its commands started from a folder with files of the same names."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import mosel
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
PACKAGES = {"mosel", "gateway", "selector", "encoders", "fusion", "bench"}
MODEL_FILES = {".toml", ".py", ".safetensors", ".json", ".md", ".npz"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    return next(out.glob("mosel_server-*.whl"))


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a fresh environment with the wheel, which borrows this environment's other packages."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    # A line in a .pth file comes after the wheel, and the editable install's own .pth there is not followed.
    site_packages = next(folder.glob("lib/python*/site-packages"))
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A user's folder whose files are named like the services."""
    for name in ("fusion", "selector", "encoders", "gateway", "mosel"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')\n")
    return tmp_path


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    """A folder of shared memory for this test alone."""
    folder = Path(tempfile.mkdtemp(prefix="mosel-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="m-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


def test_the_wheel_has_the_version_that_the_code_states(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == mosel.__version__


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    assert {name.split("/")[0] for name in names(wheel)} == PACKAGES
    assert not [name for name in names(wheel) if "__pycache__" in name or name.endswith(".pyc")]


def test_wheel_holds_the_reference_models_as_data(wheel: Path) -> None:
    inside = {name for name in names(wheel) if name.startswith("mosel/reference_models/")}
    for package in (path.parent for path in ROOT.glob("models/*/model.toml")):
        here = {path.name for path in package.iterdir() if path.suffix in MODEL_FILES}
        assert {f"mosel/reference_models/{package.name}/{name}" for name in here} <= inside
    assert {Path(name).suffix for name in inside} <= MODEL_FILES


def test_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert "Name: mosel-server\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    needed = [line for line in text.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert {line.split()[1].split(">")[0].split("<")[0] for line in needed} == {"grpcio", "numpy", "protobuf"}


def test_command_runs_from_a_hostile_folder(bin_dir: Path, hostile_folder: Path) -> None:
    result = subprocess.run(
        [bin_dir / "mosel", "--help"], check=False, cwd=hostile_folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert all(command in result.stdout for command in ("up", "demo", "predict"))


def wait_for(text: str, log: Path, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Returns when `text` stands in `log`; fails when the process ends before, or time is over."""
    give_up = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.1)


def test_services_start_from_a_hostile_folder_and_leave_nothing(
    bin_dir: Path, hostile_folder: Path, run_dir: Path, shared_memory: Path
) -> None:
    models = hostile_folder / "models"
    site_packages = next(bin_dir.parent.glob("lib/python*/site-packages"))
    shutil.copytree(site_packages / "mosel" / "reference_models" / "har", models / "har")
    (port,) = free_ports(1)
    own = {"MOSEL_RUN_DIR": str(run_dir / "run"), "MOSEL_TRANSPORT__SHM_DIR": str(shared_memory)}
    command = [str(bin_dir / "mosel"), "up", "--models", "models", "--device", "cpu", "--grpc-port", str(port)]
    log = hostile_folder / "up.log"
    with log.open("wb") as output:
        up = subprocess.Popen(command, cwd=hostile_folder, env=os.environ | own, stdout=output, stderr=output)
    try:
        wait_for(f":{port}", log, up, 120)
        children = psutil.Process(up.pid).children(recursive=True)
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0, log.read_text()
    finally:
        up.kill()
    assert children
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert "hijacked" not in log.read_text()
    assert not [path for path in run_dir.rglob("*") if path.is_socket()]
    assert not list(shared_memory.iterdir())
