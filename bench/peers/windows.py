"""Windows of closed-loop load on a server of the Open Inference Protocol, or on this one with plans first."""

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import uvloop

from bench.closed_loop import Payloads, keep_busy
from bench.peers.contestants import SETS, Contestant, Work
from gateway.inference.messages import SERVICE, ModelInferRequest, ModelInferResponse
from mosel import AsyncClient
from mosel.packages.model_package import ModelPackage

_WARM_UP, _CALL_S = 3, 60.0


@dataclass(frozen=True)
class Window:
    """Items answered per second, and the median and 99th percentile of milliseconds that a job took."""

    items_per_s: float
    p50_ms: float
    p99_ms: float


def median_of(windows: Sequence[Window]) -> Window:
    """Of each figure by itself."""
    columns = zip(*((w.items_per_s, w.p50_ms, w.p99_ms) for w in windows), strict=True)
    return Window(*map(statistics.median, columns))


def measure(address: str, contestant: Contestant, work: Work, payloads: Payloads, seconds: float) -> Window:
    """One window.

    Args:
        address: of the server.
        contestant: what is asked of it.
        work: how much at a time.
        payloads: all of one job's.
        seconds: the length.
    """
    return uvloop.run(_measure(address, contestant, work, payloads, seconds))


def payloads_of(package: ModelPackage, items: int) -> Payloads:
    """A job of so many items."""
    rng = np.random.default_rng(0)
    shapes = {name: (items, *spec.shape) for name, spec in package.modalities.items()}
    return {name: rng.standard_normal(shape).clip(-1, 1).astype(np.float32) for name, shape in shapes.items()}


async def _measure(address: str, contestant: Contestant, work: Work, payloads: Payloads, seconds: float) -> Window:
    async with AsyncClient(address) as client, grpc.aio.insecure_channel(address) as channel:
        predict = _predict(client, channel, contestant, payloads)
        for _ in range(_WARM_UP):
            await predict()
        started = time.perf_counter()
        times = await keep_busy(predict, work.in_flight, seconds)
        elapsed = time.perf_counter() - started
    p50, p99 = np.quantile(times, (0.5, 0.99)) * 1000
    return Window(len(times) * work.items / elapsed, float(p50), float(p99))


def _predict(
    client: AsyncClient, channel: grpc.aio.Channel, contestant: Contestant, payloads: Payloads
) -> Callable[[], Awaitable[Any]]:
    """What one caller does for each job."""
    if contestant.plan_first:
        return lambda: client.predict(
            contestant.model, payloads, min_accuracy=contestant.floor, plan_first=True, timeout_s=_CALL_S
        )
    infer = channel.unary_unary(
        f"/{SERVICE.full_name}/ModelInfer", ModelInferRequest.SerializeToString, ModelInferResponse.FromString
    )
    return lambda: infer(request_of(contestant, payloads), timeout=_CALL_S)


def request_of(contestant: Contestant, payloads: Payloads) -> Any:
    """What is sent, made anew for each job as callers do; a server without floors is told the set."""
    request = ModelInferRequest(model_name=contestant.model)
    for name in contestant.sends or payloads:
        request.inputs.add(name=name, datatype="FP32", shape=payloads[name].shape)
        request.raw_input_contents.append(payloads[name].tobytes())
    if contestant.floor is not None and contestant.server.startswith("ceiling"):
        request.parameters["modalities"].string_param = ",".join(SETS[contestant.floor])
    elif contestant.floor is not None:
        request.parameters["min_accuracy"].double_param = contestant.floor
    return request
