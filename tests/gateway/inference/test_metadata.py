"""What servers and models are, told over gRPC, with a selector that does what the test says."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray

import mosel
from gateway.inference.messages import message
from mosel.v1 import gateway_pb2, selector_pb2
from tests.gateway.inference.support import infer_request, stub_of
from tests.gateway.scripted import Gateway, group, release_of

Draw = Callable[..., dict[str, NDArray[Any]]]


@pytest.fixture
def ask(gateway: Gateway) -> Callable[..., Any]:
    """Calls a method, and gives the answer as JSON with the protocol's names."""
    stub = stub_of(gateway.channel)

    async def call(method: str, **content: Any) -> dict[str, Any]:
        reply = await getattr(stub, method)(message(f"{method}Request", content), timeout=30)
        return json_format.MessageToDict(
            reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )

    return call


Ask = Callable[..., Any]


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            pass


async def test_server_and_model_are_ready_while_jobs_would_be_run(gateway: Gateway, ask: Ask) -> None:
    assert await ask("ServerLive") == {"live": True}
    assert await ask("ServerReady") == {"ready": True}
    assert await ask("ModelReady", name="fruit") == {"ready": True}
    assert await ask("ModelReady", name="fruit", version="1") == {"ready": True}
    assert await ask("ModelReady", name="fruit", version="2") == {"ready": False}
    assert await ask("ModelReady", name="pear") == {"ready": False}
    away = selector_pb2.ModelStates(models=[selector_pb2.ModelState(model="fruit", ready=False)])
    gateway.selector.say(models=away)

    async def not_ready() -> bool:
        return (await ask("ServerReady"))["ready"] is False

    await until(not_ready)
    assert await ask("ServerLive") == {"live": True}
    assert await ask("ModelReady", name="fruit") == {"ready": False}
    index = {"name": "fruit", "version": "1", "state": "UNAVAILABLE", "reason": "a service that it needs is not ready"}
    assert await ask("RepositoryIndex") == {"models": [index]}
    assert await ask("RepositoryIndex", ready=True) == {"models": []}


async def test_the_index_names_ready_models(ask: Ask) -> None:
    index = {"name": "fruit", "version": "1", "state": "READY", "reason": ""}
    assert await ask("RepositoryIndex", ready=True) == {"models": [index]}


async def test_a_server_without_a_selector_is_live_but_not_ready(gateway: Gateway, ask: Ask) -> None:
    gateway.selector.outbox.put_nowait(None)

    async def not_ready() -> bool:
        return (await ask("ServerReady"))["ready"] is False

    await until(not_ready)
    assert await ask("ServerLive") == {"live": True}


async def test_the_server_says_who_it_is(ask: Ask) -> None:
    said = await ask("ServerMetadata")
    assert (said["name"], said["version"]) == ("mosel", mosel.__version__)
    assert {"model_configuration", "statistics", "schedule_policy"} <= {*said["extensions"]}
    assert not {name for name in said["extensions"] if "shared_memory" in name or name in ("sequence", "trace")}


async def test_a_model_says_what_it_takes_and_gives(ask: Ask) -> None:
    assert await ask("ModelMetadata", name="fruit") == {
        "name": "fruit",
        "versions": ["1"],
        "platform": "mosel",
        "inputs": [
            {"name": "photo", "datatype": "UINT8", "shape": ["-1", "24", "24", "3"]},
            {"name": "scent", "datatype": "FP32", "shape": ["-1", "6"]},
        ],
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": ["-1", "3"]},
            {"name": "labels", "datatype": "BYTES", "shape": ["-1"]},
            {"name": "modalities", "datatype": "BYTES", "shape": ["-1"]},
        ],
    }


async def test_a_configuration_says_that_every_input_is_optional(gateway: Gateway, ask: Ask) -> None:
    sets = [gateway_pb2.SetProfile(modality_set="photo", accuracy=0.88)]
    state = selector_pb2.ModelState(model="fruit", ready=True, sets=sets)
    gateway.selector.say(models=selector_pb2.ModelStates(models=[state]))

    async def told() -> bool:
        return len((await ask("ModelConfig", name="fruit"))["config"]["parameters"]) > 1

    await until(told)
    config = (await ask("ModelConfig", name="fruit"))["config"]
    assert config["input"] == [
        {"name": "photo", "data_type": "TYPE_UINT8", "dims": ["24", "24", "3"], "optional": True},
        {"name": "scent", "data_type": "TYPE_FP32", "dims": ["6"], "optional": True},
    ]
    assert config["output"] == [
        {"name": "probabilities", "data_type": "TYPE_FP32", "dims": ["3"]},
        {"name": "labels", "data_type": "TYPE_STRING", "dims": []},
        {"name": "modalities", "data_type": "TYPE_STRING", "dims": []},
    ]
    assert (config["name"], config["platform"], config["max_batch_size"]) == ("fruit", "mosel", 1024)
    assert config["model_transaction_policy"] == {"decoupled": False}
    assert "dynamic_batching" in config
    assert config["parameters"] == {
        "metric": {"string_value": "accuracy"},
        "accuracy.photo": {"string_value": "0.8800"},
    }


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics"])
async def test_a_model_or_version_that_is_not_served_is_not_found(ask: Ask, method: str) -> None:
    for wrong in ({"name": "pear"}, {"name": "fruit", "version": "9"}):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(method, **wrong)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_statistics_count_every_request_of_every_protocol(gateway: Gateway, ask: Ask, draw: Draw) -> None:
    async def answered(call: Any, size: int) -> None:
        description = await gateway.job_at_selector()
        groups = [group("scent", *range(size))]
        result = selector_pb2.JobResult(job_id=description.job_id, groups=groups, queue_us=2, compute_us=3)
        gateway.selector.say(result=result)
        gateway.selector.say(release=release_of(description))
        await call

    stub = stub_of(gateway.channel)

    async def submitted() -> None:
        async for _ in gateway.client.submit_job("fruit", draw(4)):
            pass

    await answered(stub.ModelInfer(infer_request(draw(3)), timeout=30), 3)
    await answered(asyncio.create_task(gateway.client.predict("fruit", draw(2))), 2)
    await answered(asyncio.create_task(submitted()), 4)
    for bad in (infer_request({}), infer_request(draw(1), model="pear")):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ModelInfer(bad, timeout=30)
    (said,) = (await ask("ModelStatistics", name="fruit"))["model_stats"]
    assert (said["name"], said["version"], said["inference_count"], said["execution_count"]) == ("fruit", "1", "9", "3")
    stats = said["inference_stats"]
    assert {name: int(total["count"]) for name, total in stats.items()} == {
        "success": 3,
        "fail": 1,
        "queue": 3,
        "compute_input": 3,
        "compute_infer": 3,
        "compute_output": 3,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    assert (int(stats["queue"]["ns"]), int(stats["compute_infer"]["ns"])) == (6_000, 9_000)
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert int(stats["success"]["ns"]) == sum(int(stats[part]["ns"]) for part in parts)
    assert int(said["last_inference"]) > 0
    assert [model["name"] for model in (await ask("ModelStatistics"))["model_stats"]] == ["fruit"]
