"""After `make demo` the command `mosel` can be had as its last line says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEXT = "next: source .venv/bin/activate (puts mosel on the path), then mosel up"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that is set up, whose demo prints one line."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup_environment.py"):
        (tmp_path / name).touch()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    mosel = tmp_path / ".venv" / "bin" / "mosel"
    mosel.write_text('#!/bin/sh\necho mosel "$@"\n')
    mosel.chmod(0o755)
    (tmp_path / ".venv" / ".ready-demo").touch()
    return tmp_path


def shell(checkout: Path, script: str) -> list[str]:
    """What a shell prints that finds no `mosel` of its own."""
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "mosel").exists()]
    environment = {"PATH": os.pathsep.join(folders)}
    result = subprocess.run(
        ["bash", "-c", script], check=True, capture_output=True, text=True, cwd=checkout, env=environment, timeout=60
    )
    return result.stdout.splitlines()


def test_the_demo_ends_with_the_way_to_the_command(checkout: Path) -> None:
    assert shell(checkout, "make demo") == ["mosel demo", NEXT]


def test_that_way_works_and_is_not_shown_again(checkout: Path) -> None:
    source = NEXT.removeprefix("next: ").partition(" (")[0]
    assert shell(checkout, f"{source}; mosel up; make demo") == ["mosel up", "mosel demo"]
