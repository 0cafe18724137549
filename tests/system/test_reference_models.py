"""The reference models through the services answer as the same networks called directly."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mosel import Client
from mosel.compute import networks
from mosel.config import FREE_PORTS, load_settings, reference_models
from mosel.data import datasets
from mosel.data.samples import Samples
from mosel.errors import DatasetError
from mosel.launcher import Launcher
from mosel.modality import format_set, subsets
from mosel.packages.model_package import ModelPackage, load_package

MODELS = ("digits", "har")
JOB_ITEMS, ITEMS = 50, 300
SETS = {name: subsets(load_package(reference_models() / name).modalities) for name in MODELS}
PROTOCOLS = Path(__file__).parents[2] / "docs" / "protocols.md"
CASES = [pytest.param(name, s, id=f"{name}-{format_set(s)}") for name in MODELS for s in SETS[name]]


@pytest.fixture(scope="module")
def services() -> Iterator[Launcher]:
    with Launcher(load_settings(models=MODELS, gateway=FREE_PORTS)) as launcher:
        launcher.wait_ready(120)
        yield launcher


@pytest.fixture(scope="module")
def client(services: Launcher) -> Iterator[Client]:
    with Client(services.address) as client:
        yield client


@pytest.fixture(scope="module")
def items() -> dict[str, tuple[dict[str, NDArray[Any]], NDArray[np.int64] | None]]:
    """Real test items with labels where they are found, else made-up ones without."""
    return {name: _items(load_package(reference_models() / name)) for name in MODELS}


def _items(package: ModelPackage) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64] | None]:
    try:
        found: Path = datasets.find(package).folder
    except DatasetError:
        return {m: networks.example_payload(package, m, ITEMS) for m in package.modalities}, None
    samples: Samples = package.load_attribute(f"{package.samples}:load")(found, "test")
    rows = np.random.default_rng(0).choice(len(samples), ITEMS, replace=False)
    taken = samples.take(rows)
    return taken.payloads, taken.labels


@torch.inference_mode()
def _direct(package: ModelPackage, payloads: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    cpu = torch.device("cpu")
    embeddings = {m: networks.load_encoder(package, m, cpu)(torch.tensor(array)) for m, array in payloads.items()}
    output: NDArray[np.float32] = networks.load_fusion(package, cpu)(embeddings).numpy()
    return output


@pytest.mark.parametrize(("model", "modality_set"), CASES)
def test_services_answer_as_the_networks_called_directly(
    client: Client,
    items: dict[str, tuple[dict[str, NDArray[Any]], NDArray[np.int64] | None]],
    model: str,
    modality_set: frozenset[str],
) -> None:
    payloads, labels = items[model]
    chosen = {m: payloads[m] for m in modality_set}
    answers = [
        client.predict(model, {m: array[start : start + JOB_ITEMS] for m, array in chosen.items()})
        for start in range(0, ITEMS, JOB_ITEMS)
    ]
    output = np.concatenate([answer.output for answer in answers]).astype(np.float32)
    direct = _direct(load_package(reference_models() / model), chosen)
    np.testing.assert_allclose(output, direct, atol=1e-4)
    assert {s for answer in answers for s in answer.modality_sets} == {format_set(modality_set)}
    # A tie in the last digits is no difference.
    top = np.sort(direct, axis=-1)
    clear = top[:, -1] - top[:, -2] > 1e-4
    assert (output.argmax(-1) == direct.argmax(-1))[clear].all()
    if labels is not None:
        accuracies = [(scores.argmax(-1) == labels).mean() for scores in (output, direct)]
        assert abs(accuracies[0] - accuracies[1]) <= 0.01


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("command", re.findall(r"```sh\n(.*?)```", PROTOCOLS.read_text(), re.DOTALL))
def test_what_docs_protocols_md_does_with_curl(services: Launcher, tmp_path: Path, command: str) -> None:
    there = command.replace("127.0.0.1:8000", services.http_address)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", there], cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr + result.stdout
    answer = result.stdout or (tmp_path / "answer.bin").read_bytes()
    assert b'"digits"' in answer
    assert b'"error"' not in answer
