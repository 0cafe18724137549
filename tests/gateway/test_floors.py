"""Floors of callers and operators, and what answers stand on, in every protocol, with a selector that is scripted."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from numpy.typing import NDArray

from gateway.access.guard import Guard
from gateway.access.interceptor import OnlyTenants
from gateway.access.middleware import OnlyTenantsHttp
from gateway.access.tenants import Tenant, Tenants, hash_of, new_token
from gateway.inference.http import InferenceHttp
from gateway.inference.servicer import InferenceServicer, handlers
from gateway.servicer import GatewayServicer
from mosel.client import JobSummary
from mosel.config import FREE_PORTS, Settings
from mosel.tensors import to_proto
from mosel.v1 import gateway_pb2, gateway_pb2_grpc, selector_pb2
from tests.gateway.inference.http_support import Http, speaking_http
from tests.gateway.inference.json_support import infer_body
from tests.gateway.inference.support import infer_request, parameters_of, stub_of
from tests.gateway.scripted import Gateway, group

Payloads = dict[str, NDArray[Any]]
Draw = Callable[..., Payloads]
OF_SETTINGS, OF_ALICE = 0.03, 0.01
TOKENS = {"alice": new_token(), "bob": new_token()}
STANDS_ON = gateway_pb2.Assurance(
    guarantee=gateway_pb2.CALIBRATED,
    guaranteed_loss=0.02,
    confidence=0.95,
    saved=0.6875,
    floor_source=gateway_pb2.TENANT,
    note="approximate",
)
IN_WORDS = {
    "guarantee": "calibrated",
    "guaranteed_loss": 0.02,
    "confidence": 0.95,
    "saved": 0.6875,
    "floor_source": "tenant",
    "note": "approximate",
}


@pytest.fixture
def settings(settings_with: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Of a gateway whose operator states a floor for all."""
    socket = tmp_path_factory.mktemp("floors") / "s.sock"
    gateway = FREE_PORTS | {"max_accuracy_loss": OF_SETTINGS}
    # Payloads in slots, which the selector releases.
    transport = {"gateway_arena_mib": 1, "inline_max_kib": 0}
    return settings_with(selector={"address": f"unix:{socket}"}, gateway=gateway, transport=transport)


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[Http]:
    async with speaking_http(gateway) as http:
        yield http


def tenants_of(loss: float | None) -> Tenants:
    """Alice, who may lose so much, and Bob, of whom nothing is said."""
    alice = Tenant(token_sha256=(hash_of(TOKENS["alice"]),), max_accuracy_loss=loss)
    return {"alice": alice, "bob": Tenant(token_sha256=(hash_of(TOKENS["bob"]),))}


@dataclass
class Guarded:
    """Ways in for tenants."""

    guard: Guard
    channel: grpc.aio.Channel
    http: httpx.AsyncClient


@pytest.fixture
async def guarded(gateway: Gateway) -> AsyncIterator[Guarded]:
    guard = gateway.data_plane.guard = Guard(tenants_of(OF_ALICE), Counter())
    server = grpc.aio.server(interceptors=(OnlyTenants(guard),))
    gateway_pb2_grpc.add_GatewayServicer_to_server(GatewayServicer(gateway.data_plane), server)
    server.add_generic_rpc_handlers((handlers(InferenceServicer(gateway.data_plane)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with InferenceHttp(gateway.data_plane) as inference:
        transport = httpx.ASGITransport(OnlyTenantsHttp(inference.app(), guard))
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
            httpx.AsyncClient(transport=transport, base_url="http://here") as http,
        ):
            yield Guarded(guard, channel, http)
    await server.stop(None)


def bearer(tenant: str) -> str:
    return f"Bearer {TOKENS[tenant]}"


def floor_of(job: selector_pb2.JobDescription) -> tuple[float | None, str]:
    loss = job.max_accuracy_loss if job.HasField("max_accuracy_loss") else None
    return loss, gateway_pb2.FloorSource.Name(job.floor_source)


@asynccontextmanager
async def asked(gateway: Gateway, call: Callable[[], Any]) -> AsyncIterator[selector_pb2.JobDescription]:
    """The job of a call, which begins when it is called, is answered at the end of the block and must not fail."""

    async def begin() -> None:
        await call()

    async with asyncio.TaskGroup() as tasks, asyncio.timeout(30):
        task = tasks.create_task(begin())
        description = await gateway.job_at_selector()
        yield description
        gateway.answer(description)
        await task


async def test_what_the_caller_states_gets_to_the_selector(gateway: Gateway, http: Http, draw: Draw) -> None:
    payloads, triton = draw(2), stub_of(gateway.channel)

    async def streamed() -> None:
        async for _ in gateway.client.submit_job("fruit", payloads, max_accuracy_loss=0.25):
            pass

    calls: list[Callable[[], Any]] = [
        lambda: gateway.client.predict("fruit", payloads, max_accuracy_loss=0.25),
        streamed,
        lambda: triton.ModelInfer(infer_request(payloads, max_accuracy_loss=0.25)),
        lambda: http.infer(infer_body(payloads, binary=False, max_accuracy_loss=0.25)),
        lambda: http.infer(infer_body(payloads, binary=True, max_accuracy_loss="0.25")),
        lambda: triton.ModelStreamInfer(iter([infer_request(payloads, max_accuracy_loss=0.25)])).read(),
    ]
    for call in calls:
        async with asked(gateway, call) as job:
            assert floor_of(job) == (0.25, "CALLER")
    await gateway.client.plan("fruit", 4, max_accuracy_loss=0.25)
    assert floor_of(gateway.selector.planned[-1]) == (0.25, "CALLER")
    async with asked(gateway, lambda: gateway.client.predict("fruit", payloads, min_accuracy=0.5)) as job:
        assert (job.min_accuracy, floor_of(job)) == (0.5, (None, "CALLER"))


async def test_the_floor_of_the_settings_counts_for_callers_who_state_none(
    gateway: Gateway, http: Http, draw: Draw
) -> None:
    payloads, triton = draw(2), stub_of(gateway.channel)

    async def streamed() -> None:
        async for _ in gateway.client.submit_job("fruit", payloads):
            pass

    calls: list[Callable[[], Any]] = [
        lambda: gateway.client.predict("fruit", payloads),
        streamed,
        lambda: triton.ModelInfer(infer_request(payloads)),
        lambda: http.infer(infer_body(payloads)),
    ]
    for call in calls:
        async with asked(gateway, call) as job:
            assert floor_of(job) == (OF_SETTINGS, "SETTINGS")
    await gateway.client.plan("fruit", 4)
    assert floor_of(gateway.selector.planned[-1]) == (OF_SETTINGS, "SETTINGS")


async def test_it_does_not_count_where_the_caller_fixed_what_is_run(gateway: Gateway, http: Http, draw: Draw) -> None:
    payloads = draw(2)
    calls: list[Callable[[], Any]] = [
        lambda: gateway.client.predict("fruit", payloads, modalities=["scent"]),
        lambda: stub_of(gateway.channel).ModelInfer(infer_request(payloads, policy="all")),
        lambda: http.infer(infer_body(payloads, modalities="photo")),
    ]
    for call in calls:
        async with asked(gateway, call) as job:
            assert (job.exact, floor_of(job)) == (True, (None, "FLOOR_SOURCE_UNSPECIFIED"))


async def test_the_floor_of_the_tenant_counts_before_that_of_the_settings(
    gateway: Gateway, guarded: Guarded, draw: Draw
) -> None:
    payloads, triton = draw(2), stub_of(guarded.channel)
    mosel = gateway_pb2_grpc.GatewayStub(guarded.channel)
    messages = {name: to_proto(array) for name, array in payloads.items()}
    spec = gateway_pb2.JobSpec(model="fruit", size=2)
    predict = gateway_pb2.PredictRequest(model="fruit", payloads=messages)
    items = [
        gateway_pb2.SubmitJobRequest(job=spec),
        gateway_pb2.SubmitJobRequest(items=gateway_pb2.ItemBatch(payloads=messages)),
    ]
    plan, body = gateway_pb2.PlanRequest(job=spec), infer_body(payloads)

    async def all_of(stream: Any) -> None:
        async for _ in stream:
            pass

    def calls_of(who: Any, headers: dict[str, str]) -> list[Callable[[], Any]]:
        return [
            lambda: mosel.Predict(predict, **who),
            lambda: all_of(mosel.SubmitJob(iter(items), **who)),
            lambda: triton.ModelInfer(infer_request(payloads), **who),
            lambda: all_of(triton.ModelStreamInfer(iter([infer_request(payloads)]), **who)),
            lambda: guarded.http.post("/v2/models/fruit/infer", content=body.content, headers=headers),
        ]

    for tenant, floor in (("alice", (OF_ALICE, "TENANT")), ("bob", (OF_SETTINGS, "SETTINGS"))):
        header = ("authorization", bearer(tenant))
        who, headers = {"metadata": (header,)}, dict([*dict(body.headers).items(), header])
        for call in calls_of(who, headers):
            async with asked(gateway, call) as job:
                assert floor_of(job) == floor
        await mosel.Plan(plan, metadata=(header,))
        assert floor_of(gateway.selector.planned[-1]) == floor


async def test_a_changed_tokens_file_counts_for_the_next_request_of_a_stream(
    gateway: Gateway, guarded: Guarded, draw: Draw
) -> None:
    who = (("authorization", bearer("alice")),)
    stream = stub_of(guarded.channel).ModelStreamInfer(metadata=who)
    for loss, floor in ((OF_ALICE, (OF_ALICE, "TENANT")), (0.125, (0.125, "TENANT")), (None, (0.03, "SETTINGS"))):
        guarded.guard.replace(tenants_of(loss))
        await stream.write(infer_request(draw(1)))
        async with asked(gateway, stream.read) as job:
            assert floor_of(job) == floor
    stream.cancel()


async def test_every_answer_says_what_it_stands_on(gateway: Gateway, http: Http, draw: Draw) -> None:
    payloads, triton = draw(2), stub_of(gateway.channel)
    summaries: list[JobSummary] = []

    async def streamed() -> None:
        events = [event async for event in gateway.client.submit_job("fruit", payloads)]
        summaries.extend(event for event in events if isinstance(event, JobSummary))

    async def answered(call: Any) -> Any:
        task = asyncio.ensure_future(call)
        async with asyncio.timeout(30):
            job = await gateway.job_at_selector()
            groups = [group("scent", *range(job.size))]
            result = selector_pb2.JobResult(job_id=job.job_id, groups=groups, assurance=STANDS_ON)
            gateway.selector.say(result=result)
            return await task

    messages = {name: to_proto(array) for name, array in payloads.items()}
    reply = await answered(gateway.stub.Predict(gateway_pb2.PredictRequest(model="fruit", payloads=messages)))
    assert reply.assurance == STANDS_ON
    prediction = await answered(gateway.client.predict("fruit", payloads))
    assert str(prediction.assurance) == "guaranteed at most 0.020 worse than everything (95 %)"
    await answered(streamed())
    assert [summary.assurance for summary in summaries] == [prediction.assurance]
    over_grpc = parameters_of(await answered(triton.ModelInfer(infer_request(payloads))))
    over_http = (await answered(http.infer(infer_body(payloads)))).json()["parameters"]
    for said in (over_grpc, over_http):
        assert {name: said[name] for name in IN_WORDS} == IN_WORDS
        assert "guaranteed_accuracy" not in said


async def test_a_selector_that_says_nothing_of_it_leaves_answers_as_they_were(gateway: Gateway, draw: Draw) -> None:
    task = asyncio.ensure_future(gateway.client.predict("fruit", draw(1)))
    gateway.answer(await gateway.job_at_selector())
    prediction = await task
    assert str(prediction.assurance) == "expected, not guaranteed"
    response = stub_of(gateway.channel).ModelInfer(infer_request(draw(1)))
    gateway.answer(await gateway.job_at_selector())
    assert parameters_of(await response).keys().isdisjoint(IN_WORDS)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (1.5, "max_accuracy_loss is 1.5; expected a number from 0 to 1"),
        (float("nan"), "max_accuracy_loss is nan; expected a number from 0 to 1"),
        (-0.25, "max_accuracy_loss is -0.25; expected a number from 0 to 1"),
    ],
)
async def test_a_loss_that_is_none_is_refused_by_every_protocol(
    gateway: Gateway, http: Http, draw: Draw, loss: float, message: str
) -> None:
    payloads = draw(1)
    messages = {name: to_proto(array) for name, array in payloads.items()}
    spec = gateway_pb2.JobSpec(model="fruit", size=1, max_accuracy_loss=loss)
    calls = [
        gateway.stub.Predict(gateway_pb2.PredictRequest(model="fruit", payloads=messages, max_accuracy_loss=loss)),
        gateway.stub.Plan(gateway_pb2.PlanRequest(job=spec)),
        gateway.stub.SubmitJob(iter([gateway_pb2.SubmitJobRequest(job=spec)])).read(),
        stub_of(gateway.channel).ModelInfer(infer_request(payloads, max_accuracy_loss=loss)),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)
    response = await http.infer(infer_body(payloads, max_accuracy_loss=str(loss)))
    assert (response.status_code, response.json()["error"]) == (400, message)


async def test_both_floors_at_once_are_refused_by_every_protocol(gateway: Gateway, http: Http, draw: Draw) -> None:
    payloads = draw(1)
    both: dict[str, Any] = {"min_accuracy": 0.5, "max_accuracy_loss": 0.5}
    messages = {name: to_proto(array) for name, array in payloads.items()}
    spec = gateway_pb2.JobSpec(model="fruit", size=1, **both)
    calls = [
        gateway.stub.Predict(gateway_pb2.PredictRequest(model="fruit", payloads=messages, **both)),
        gateway.stub.Plan(gateway_pb2.PlanRequest(job=spec)),
        gateway.stub.SubmitJob(iter([gateway_pb2.SubmitJobRequest(job=spec)])).read(),
        stub_of(gateway.channel).ModelInfer(infer_request(payloads, **both)),
    ]
    message = "min_accuracy and max_accuracy_loss; expected one of them"
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)
    response = await http.infer(infer_body(payloads, **both))
    assert (response.status_code, response.json()["error"]) == (400, message)


async def test_who_needs_no_token_is_no_tenant(gateway: Gateway, guarded: Guarded) -> None:
    """As on the socket of this user, who is let in beside the guard."""
    assert guarded.guard.max_accuracy_loss("alice") == OF_ALICE
    await gateway.client.plan("fruit", 4)
    assert floor_of(gateway.selector.planned[-1]) == (OF_SETTINGS, "SETTINGS")
