"""One setting bounds every message; what goes beyond it is refused in words that name it, and disturbs nobody else."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from bench.null_model import NAME, write_null_model
from mosel.client import Client
from mosel.config import Settings
from mosel.errors import InvalidRequest, PayloadTooLarge
from mosel.launcher import Launcher
from mosel.packages.model_package import ModelPackage
from mosel.status import error_from_rpc
from mosel.v1 import gateway_pb2_grpc, tensor_pb2
from mosel.v1.gateway_pb2 import PredictRequest

OUTPUT = 20_000
ITEM_BYTES = OUTPUT * 4
Payloads = dict[str, NDArray[np.generic]]


@pytest.fixture(scope="module")
def served(
    fruit: ModelPackage, settings_with: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Launcher]:
    """A model with large outputs, and messages of 1 MiB at most; its calls have 4 items at most."""
    models = tmp_path_factory.mktemp("models")
    write_null_model(models, replace(fruit, output=replace(fruit.output, shape=(OUTPUT,), labels=())))
    settings = settings_with(
        models_dir=models, transport={"max_message_mib": 1}, selector={"profile_batch_sizes": [1, 4]}
    )
    with Launcher(settings) as launcher:
        launcher.wait_ready(120)
        yield launcher


def scents(items: int) -> Payloads:
    return {"scent": np.zeros((items, 6), np.float32)}


def test_outputs_beyond_the_limit_fail_their_job_and_no_other(served: Launcher) -> None:
    with Client(served.address, max_message_mib=1) as client:
        for _ in range(2):
            assert client.predict(NAME, scents(12), modalities=["scent"]).output.shape == (12, OUTPUT)
            with pytest.raises(InvalidRequest) as refused:
                client.predict(NAME, scents(16), modalities=["scent"])
            assert str(refused.value).startswith(f"the outputs have {16 * ITEM_BYTES} bytes; expected at most ")
            assert str(refused.value).endswith("bytes (setting transport.max_message_mib): send fewer items")


def test_results_that_come_one_by_one_have_no_such_limit(served: Launcher) -> None:
    with Client(served.address, max_message_mib=1) as client:
        events = list(client.submit_job(NAME, scents(64), modalities=["scent"]))
    assert sum(len(getattr(event, "items", ())) for event in events) == 64


def test_a_request_beyond_the_limit_is_grpc_s_to_refuse_and_ours_to_explain(served: Launcher) -> None:
    payload = tensor_pb2.Tensor(dtype=tensor_pb2.FP32, shape=[400_000], data=bytes(1_600_000))
    request = PredictRequest(model=NAME, payloads={"scent": payload})
    with grpc.insecure_channel(served.address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            gateway_pb2_grpc.GatewayStub(channel).Predict(request, timeout=30)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = error_from_rpc(refused.value, "gateway")
    assert isinstance(error, PayloadTooLarge)
    assert "(setting transport.max_message_mib)" in str(error)
