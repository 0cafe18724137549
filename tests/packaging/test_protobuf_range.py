"""The generated code loads and works at both ends of the protobuf range that pyproject.toml allows."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOWEST, NEEDED_BY_TRITONCLIENT, HIGHEST = "protobuf==6.31.1", "protobuf==6.33.*", "protobuf==7.36.*"
ROUND_TRIP = """
import importlib, pathlib, sys, warnings
warnings.simplefilter("error")
from google.protobuf import __version__ as version
for path in sorted(pathlib.Path("mosel/v1").glob("*_pb2*.py")):
    module = importlib.import_module(f"mosel.v1.{path.stem}")
    for descriptor in getattr(module, "DESCRIPTOR", None) and module.DESCRIPTOR.message_types_by_name.values() or ():
        kind = getattr(module, descriptor.name)
        message = kind()
        for field in descriptor.fields:
            if field.type == field.TYPE_STRING and not field.is_repeated:
                setattr(message, field.name, "é" + field.name)
        assert kind.FromString(message.SerializeToString()) == message, descriptor.full_name
import mosel
print(version, "torch" in sys.modules)
"""


def client_environment(folder: Path, protobuf: str) -> Path:
    """A fresh environment with the client's dependencies alone; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--only-binary=:all:"]
    wanted = [protobuf, "numpy", "grpcio", "--timeout=10", "--retries=0", "--disable-pip-version-check"]
    installed = subprocess.run([*pip, *wanted], check=False, capture_output=True, text=True)
    if "Could not find a version" in installed.stderr or "No matching distribution" in installed.stderr:
        pytest.skip(f"pip reaches no index that has {protobuf}: {installed.stderr.strip().splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr
    return python


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(800)
@pytest.mark.parametrize("protobuf", [LOWEST, NEEDED_BY_TRITONCLIENT, HIGHEST])
def test_generated_code_round_trips(tmp_path: Path, protobuf: str) -> None:
    python = client_environment(tmp_path / "venv", protobuf)
    result = subprocess.run([python, "-c", ROUND_TRIP], check=False, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version, torch = result.stdout.split()
    assert version.startswith(protobuf.removeprefix("protobuf==").removesuffix("*"))
    assert torch == "False"
