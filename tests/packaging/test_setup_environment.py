"""Set-up: each check is one clear line, and the size of torch is told before it is downloaded."""

import shutil
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import setup_environment
from scripts.setup_environment import GB, Pip, SetupProblem

ROOT = Path(__file__).parents[2]


def test_an_old_python_is_named() -> None:
    with pytest.raises(
        SetupProblem, match=r"^Python 3\.9\.18 is too old: 3\.11 or newer is needed \(make PYTHON=.*\)$"
    ):
        setup_environment.check_python((3, 9, 18))


def test_a_python_newer_than_tested_is_said_and_tried(capsys: pytest.CaptureFixture[str]) -> None:
    setup_environment.check_python((3, 15, 0))
    assert capsys.readouterr().out == "setup: Python 3.15.0 is newer than what is tested (3.11 to 3.13); going on\n"


def test_a_missing_venv_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SetupProblem, match=r"^this Python has no module 'ensurepip': install it .*python3-venv\)$"):
        setup_environment.check_venv()


def test_a_full_disk_is_said_with_both_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=700 * 10**6))
    with pytest.raises(SetupProblem, match=rf"^700 MB free in {tmp_path}: 3\.0 GB are needed$"):
        setup_environment.check_disk(tmp_path, 3 * GB)


class Recorder(Pip):
    """Asks for nothing, remembers what it was asked, and tells of the wheels it is given."""

    def __init__(self, found: dict[str, str]) -> None:
        self.found = found
        self.installed: list[tuple[str, ...]] = []

    def install(self, *arguments: str) -> None:
        self.installed.append(arguments)

    def has(self, requirement: str) -> bool:
        return False

    def wheels(self, *arguments: str) -> dict[str, str]:
        return self.found


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_elsewhere_the_client_alone_is_installed_and_the_container_named(
    system: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pip = Recorder({})
    monkeypatch.setattr(setup_environment, "create_venv", lambda folder: folder / "bin" / "python")
    monkeypatch.setattr(setup_environment, "Pip", lambda _: pip)
    with pytest.raises(
        SetupProblem, match=rf"client is ready .* run on Linux only, on {system} in a container: docker run"
    ):
        setup_environment.setup("demo", tmp_path, None, system)
    assert pip.installed[-1] == ("-e", ".")


def test_the_end_says_how_to_get_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = Recorder({"torch": wheel_of(1000, tmp_path, "torch")})
    monkeypatch.setattr(setup_environment, "create_venv", lambda folder: folder / "bin" / "python")
    monkeypatch.setattr(setup_environment, "Pip", lambda _: pip)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * GB))
    folder = tmp_path / ".venv"
    folder.mkdir()
    setup_environment.setup("dev", folder, None, "Linux")
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "setup: done; source .venv/bin/activate puts mosel on the path"
    assert sorted(file.name for file in folder.iterdir()) == [".ready-demo", ".ready-dev"]


def wheel_of(size: int, folder: Path, name: str) -> str:
    """The address of a file of `size` bytes that takes no space."""
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size)
    return path.as_uri()


def test_the_cpu_build_is_told_with_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pip = Recorder({"torch": wheel_of(190 * 10**6, tmp_path, "torch"), "sympy": "file:///not/counted"})
    setup_environment.install_torch(pip, index=None)
    assert capsys.readouterr().out.splitlines()[-1].endswith("(190 MB to download, 1 files)")
    assert pip.installed == [(setup_environment.torch_requirement(),)]


def test_the_cuda_build_is_told_with_its_size_and_the_way_to_the_small_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100 * GB))
    sizes = {"torch": 800 * 10**6, "nvidia-cublas": 1500 * 10**6, "triton": 200 * 10**6}
    pip = Recorder({name: wheel_of(size, tmp_path, name) for name, size in sizes.items()})
    setup_environment.install_torch(pip, index=None)
    *_, build, size = capsys.readouterr().out.splitlines()
    assert "TORCH_INDEX=<address>" in build
    assert "pytorch.org/get-started" in build
    assert "(2.5 GB to download, 3 files)" in size


def test_another_index_serves_torch_and_nothing_else(tmp_path: Path) -> None:
    pip = Recorder({"torch": wheel_of(1000, tmp_path, "torch")})
    setup_environment.install_torch(pip, index="https://example.invalid/cpu")
    assert pip.installed[0][:3] == ("--no-deps", "--index-url", "https://example.invalid/cpu")


def test_a_server_that_tells_no_size_is_no_failure() -> None:
    assert setup_environment.download_size(["file:///no/such/file"]) is None


def test_a_failing_pip_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.symlink_to(sys.executable)
    with pytest.raises(SetupProblem, match=r"(?s)pip failed, the whole output is in .*setup\.log:\n.*no-such-folder"):
        Pip(python).install("--no-index", str(tmp_path / "no-such-folder"))


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["server"], *extras["demo"], *extras["dev"]]
    needed = {line.partition(";")[0].split(">")[0].split("=")[0].strip() for line in listed}
    assert {name for name in needed if not name.startswith("mosel-server")} <= pinned
