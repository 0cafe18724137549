"""Networks of a package: random weights that are the same everywhere, and made-up payloads."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mosel.compute.networks import Hosted, Loaded, example_payload, load_encoder, load_fusion, to_tensor
from mosel.errors import PackageError
from mosel.packages.manifest import ModalitySpec, OutputSpec
from mosel.packages.model_package import ModelPackage
from mosel.tensors import DTYPES

CPU = torch.device("cpu")
NETWORKS = """
from torch import nn


class Square(nn.Linear):
    def __init__(self):
        super().__init__(5, 5)
"""


@pytest.fixture
def package(tmp_path: Path) -> ModelPackage:
    (tmp_path / "networks.py").write_text(NETWORKS)
    modalities = {name.lower(): ModalitySpec(name, (5, 40), "networks:Square", (5,)) for name in DTYPES}
    return ModelPackage(
        folder=tmp_path,
        revision="0",
        content_hash="0",
        code="0",
        name="squares",
        version="1",
        description="",
        metric="accuracy",
        modalities=modalities,
        fusion="networks:Square",
        output=OutputSpec(shape=(5,)),
        weights=tmp_path / "weights.safetensors",
        accuracy_file=tmp_path / "accuracy.json",
        default_min_accuracy=None,
        max_accuracy_loss=None,
        samples=None,
        sources=None,
        train=None,
        random_weights=True,
        serve_by_default=True,
        parameters={},
        optimise=True,
        tolerance=1e-4,
    )


def test_random_weights_are_the_same_at_every_load_and_differ_between_networks(package: ModelPackage) -> None:
    first = [load_encoder(package, "fp32", CPU), load_encoder(package, "uint8", CPU), load_fusion(package, CPU)]
    torch.rand(7)
    again = [load_encoder(package, "fp32", CPU), load_encoder(package, "uint8", CPU), load_fusion(package, CPU)]
    weights = [network.get_parameter("weight").tolist() for network in first]
    assert weights == [network.get_parameter("weight").tolist() for network in again]
    assert weights[0] != weights[1] != weights[2] != weights[0]
    assert not any(network.training for network in first)


def test_making_random_weights_leaves_torch_s_generator_alone(package: ModelPackage) -> None:
    before = torch.get_rng_state()
    load_fusion(package, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_random_weights_the_file_must_be_there(package: ModelPackage) -> None:
    with pytest.raises(PackageError, match=r"weights\.safetensors: cannot be read as safetensors"):
        load_fusion(replace(package, random_weights=False), CPU)


@pytest.mark.parametrize("dtype", DTYPES)
def test_made_up_payloads_vary_whatever_their_type(package: ModelPackage, dtype: str) -> None:
    payload = example_payload(package, dtype.lower(), 3)
    assert (payload.shape, payload.dtype) == ((3, 5, 40), DTYPES[dtype])
    values = to_tensor(payload, dtype, CPU).double()
    highest = 255 if dtype == "UINT8" else 1
    assert float(values.min()) >= 0
    assert highest / 2 < float(values.max()) <= highest
    assert 0.3 * highest < float(values.mean()) < 0.7 * highest
    np.testing.assert_array_equal(payload, example_payload(package, dtype.lower(), 3))


def test_services_of_one_process_load_in_turn(fruit: ModelPackage) -> None:
    """Tracing finds what it could not follow by warnings, and those of a process are for all of its threads."""
    loading, together = list[str](), list[str]()

    def alone(loaded: Loaded, modality: str) -> Loaded:
        loading.append(modality)
        time.sleep(0.1)
        together.extend(loading[1:])
        loading.remove(modality)
        return loaded

    hosted = {
        modality: Hosted(
            partial(load_encoder, modality=modality, device=CPU), id, CPU, partial(alone, modality=modality)
        )
        for modality in fruit.modalities
    }
    with ThreadPoolExecutor(len(hosted)) as threads:
        list(threads.map(lambda service: service.load(fruit), hosted.values()))
    assert [service.models for service in hosted.values()] == [[fruit.id]] * 2
    assert together == []
