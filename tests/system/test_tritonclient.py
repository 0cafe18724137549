"""tritonclient as its users install it, in an environment of its own, against running services."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mosel.config import Settings
from mosel.launcher import Launcher
from mosel.packages.calibration import UNLABELLED, Calibration, save_calibration
from mosel.packages.model_package import ModelPackage, load_package

ROOT = Path(__file__).parents[2]
CALLS = Path(__file__).parent / "triton"
# What the gateway imports before it computes anything.
SHARED = ["platformdirs>=4.2", "prometheus-client>=0.21", "pydantic-settings>=2.6", "python-json-logger>=3.2"]
NEEDED = ["tritonclient[grpc,http]==2.73.*", "grpcio-health-checking>=1.76", "grpcio-reflection>=1.76", *SHARED]

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
Directly = Callable[..., NDArray[Any]]
Script = Callable[..., None]

pytestmark = pytest.mark.network


@pytest.fixture(scope="session")
def python(pytestconfig: pytest.Config) -> Path:
    """The Python of an environment with tritonclient, which is kept from one run to the next."""
    assert pytestconfig.cache is not None
    folder = pytestconfig.cache.mkdir("tritonclient") / f"python{sys.version_info.major}.{sys.version_info.minor}"
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if installed.exists() and installed.read_text().splitlines() == NEEDED:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--only-binary=:all:"]
    command = [*pip, *NEEDED, "--timeout=10", "--retries=0", "--disable-pip-version-check"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if "Could not find a version" in result.stderr or "No matching distribution" in result.stderr:
        pytest.skip(f"pip reaches no index that has tritonclient: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    installed.write_text("\n".join(NEEDED))
    return python


@pytest.fixture
def run(python: Path, tmp_path: Path) -> Script:
    """Runs one of the scripts of tests/system/triton in that environment."""

    def call(script: str, *arguments: object) -> None:
        command = [str(python), str(CALLS / script), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr

    return call


@pytest.fixture
def payloads(tmp_path: Path, draw: Draw) -> Payloads:
    """Four items, also in `payloads.npz`."""
    payloads = draw(4, seed=3)
    np.savez(tmp_path / "payloads.npz", **payloads)  # type: ignore[arg-type] # arrays, whatever their type
    return payloads


def close(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def check_classes(classes: NDArray[Any], expected: NDArray[Any], labels: tuple[str, ...]) -> None:
    """The two largest of each row, as `value:index:label`."""
    assert classes.shape == (len(expected), 2)
    for texts, row in zip(classes, expected, strict=True):
        for text, index in zip(texts, row.argsort()[::-1], strict=False):
            value, *rest = text.split(":")
            assert rest == [str(index), labels[index]]
            assert float(value) == pytest.approx(row[index], abs=1e-5)


def test_ordinary_calls_over_grpc(
    services: Launcher, run: Script, tmp_path: Path, payloads: Payloads, directly: Directly, fruit: ModelPackage
) -> None:
    run("grpc_calls.py", services.address, tmp_path)
    full, labels = directly(payloads, payloads), fruit.output.labels
    with np.load(tmp_path / "grpc.npz") as answers:
        for name in ("probabilities", "typed", "later", "stream"):
            close(answers[name], full)
        close(answers["subset"], directly(payloads, ["scent"]))
        assert answers["labels"].tolist() == [labels[index] for index in full.argmax(-1)]
        check_classes(answers["classes"], full, labels)


def test_ordinary_calls_over_http(
    services: Launcher, run: Script, tmp_path: Path, payloads: Payloads, directly: Directly, fruit: ModelPackage
) -> None:
    run("http_calls.py", services.http_address, tmp_path)
    full = directly(payloads, payloads)
    with np.load(tmp_path / "http.npz") as answers:
        for name in ("probabilities", "json", "mixed", "compressed", "later"):
            close(answers[name], full)
        close(answers["subset"], directly(payloads, ["scent"]))
        check_classes(answers["classes"], full, fruit.output.labels)


def test_names_numbers_and_types_are_tritonclient_s(run: Script) -> None:
    run("fields.py", ROOT / "gateway" / "inference" / "open_inference.binpb")


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_the_messages_of_both_live_in_one_process(run: Script, first: str) -> None:
    run("coexistence.py", first)


@pytest.fixture
def models_with_a_floor(models_dir: Path, tmp_path: Path) -> Path:
    """`fruit`, with a floor of its operator in model.toml, and sets that agreed on all calibration rows."""
    folder = tmp_path / "models" / "fruit"
    shutil.copytree(models_dir / "fruit", folder)
    manifest = folder / "model.toml"
    manifest.write_text(f"max_accuracy_loss = 0.02\n{manifest.read_text()}")
    package, rows = load_package(folder), 2000
    sets = [frozenset({"photo"}), frozenset({"scent"}), frozenset({"photo", "scent"})]
    calibration = Calibration(
        content_hash=package.content_hash,
        sets=sets,
        answers=np.tile(np.arange(rows, dtype=np.int32)[:, np.newaxis] % 3, len(sets)),
        confidence=np.full((rows, len(sets)), 0.9, np.float32),
        labels=np.full(rows, UNLABELLED, np.int32),
        groups=np.arange(rows, dtype=np.int32)[:, np.newaxis],
        group_names=["item"],
        certify=np.arange(rows) % 4 != 0,
    )
    save_calibration(folder / "calibration.npz", calibration)
    return folder.parent


def test_a_floor_of_the_operator_saves_compute_for_a_client_that_knows_nothing_of_it(
    models_with_a_floor: Path,
    settings_with: Callable[..., Settings],
    run: Script,
    tmp_path: Path,
    payloads: Payloads,
) -> None:
    with Launcher(settings_with(models_dir=models_with_a_floor, placement="single")) as launcher:
        launcher.wait_ready(120)
        run("floor_calls.py", launcher.address, launcher.http_address, tmp_path)
    for said in json.loads((tmp_path / "floors.json").read_text()).values():
        assert said["modalities_used"] == "scent"
        assert (said["guarantee"], said["floor_source"], said["confidence"]) == ("calibrated", "model", 0.95)
        assert 0 <= said["guaranteed_loss"] <= 0.02
        assert 0.2 < said["saved"] < 1
