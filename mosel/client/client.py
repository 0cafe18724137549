"""The Python client: numpy arrays or tensors in, dataclasses out. Needs grpcio, protobuf and numpy only."""

import time
from collections.abc import Generator, Iterable, Iterator
from typing import Self, TypeVar, Unpack

import grpc

from mosel.client import calls
from mosel.client.answers import (
    JobEvent,
    JobInfo,
    ModelInfo,
    PlanInfo,
    Prediction,
    ServiceInfo,
    event_from,
)
from mosel.client.calls import LOAD_TIMEOUT_S, UnaryCall
from mosel.client.checks import flag, seconds
from mosel.client.connection import Connection
from mosel.client.demands import Demand, Payloads, Upload
from mosel.client.observed import ObserveEvent, observed_from
from mosel.client.retry import DEFAULT_RETRY, Retry
from mosel.client.uploads import PlannedUpload, UploadPlans
from mosel.errors import Unreachable
from mosel.tls import Tls
from mosel.v1 import gateway_pb2, gateway_pb2_grpc

Found = TypeVar("Found")


class Client:
    """Calls a gateway; usable from several threads; a context manager.

    Args:
        address: `host:port` or `unix:/path`.
        token: says who calls, where the gateway asks for it.
        tls: what to trust, and how to show who calls; None: plain text.
        max_message_mib: the largest message in either direction; the gateway has the same setting.
        retries: which calls are made again; None: none.

    Raises:
        InvalidRequest: the token cannot be sent.
        ConfigError: a file of `tls` is wrong.

    Example:
        >>> with Client("127.0.0.1:8001") as client:
        ...     prediction = client.predict("digits", {"image": images, "pen": pens}, min_accuracy=0.85)
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        max_message_mib: int = 64,
        retries: Retry | None = DEFAULT_RETRY,
    ) -> None:
        self._connection = at = Connection(address, token, tls, max_message_mib, retries)
        if (credentials := at.credentials) is None:
            self._channel = grpc.insecure_channel(address, at.options)
        else:
            self._channel = grpc.secure_channel(address, credentials, at.options)
        self._stub, self._plans = gateway_pb2_grpc.GatewayStub(self._channel), UploadPlans()

    def predict(
        self,
        model: str,
        payloads: Payloads,
        *,
        plan_first: bool = False,
        timeout_s: float = 30.0,
        **demand: Unpack[Demand],
    ) -> Prediction:
        """Predicts one job.

        Args:
            model: its name.
            payloads: arrays or tensors [items, ...] by modality; any non-empty subset of the model's.
            plan_first: send only what the server says that jobs like this one use; it is asked now and then.
            timeout_s: seconds after which the call is given up, further attempts included.
            demand: floor, deadline and more, see `Demand`; a deadline counts from the first attempt.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        limit_mib = self._connection.max_message_mib
        if not flag("plan_first", plan_first):
            return self._call(calls.predict(model, payloads, demand, limit_mib), timeout_s)
        upload = PlannedUpload(self._plans, model, payloads, demand, limit_mib, timeout_s)
        while upload.answer is None:
            try:
                self._call(upload.next_call(), upload.left_s)
            except Unreachable as error:
                upload.refused(error)
        return upload.answer

    def submit_job(
        self,
        model: str,
        items: Payloads | Iterable[Payloads],
        *,
        size: int | None = None,
        timeout_s: float = 30.0,
        **demand: Unpack[Demand],
    ) -> Generator[JobEvent, None, None]:
        """Predicts one job and gives its results as they finish. Closing the iterator cancels the job.

        It is sent once, whatever `retries` say: its items may be gone.

        Args:
            model: its name.
            items: arrays or tensors [items, ...] by modality, all at once or in batches, all of the same modalities.
            size: items of the job; needed if they come in batches.
            timeout_s: seconds after which the call is given up.
            demand: floor, deadline and more, see `Demand`; without `modalities`, batches bring all of the model's.

        Yields:
            JobAccepted, then ItemResults until each item is in one, then JobSummary.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        upload = Upload(model, items, size, demand, self._connection.max_message_mib)
        return self._events(upload, upload.requests(), seconds("timeout_s", timeout_s))

    def plan(self, model: str, size: int, *, timeout_s: float = 5.0, **demand: Unpack[Demand]) -> PlanInfo:
        """What a job of so many items would get if it were sent now; runs nothing.

        Raises:
            MoselError: the kind says what went wrong (see mosel.errors).
        """
        return self._call(calls.plan(model, size, demand), timeout_s)

    def job(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """Where a job is. Where the address stands for several gateways, each is asked until one knows the job.

        Raises:
            JobNotFound: there is no such job.
            MoselError: the kind says what else went wrong (see mosel.errors).
        """
        return self._call(calls.job(job_id), timeout_s)

    def cancel(self, job_id: str, timeout_s: float = 5.0) -> JobInfo:
        """Ends a job unless it is over, and says where it is then; errors as of `job`."""
        return self._call(calls.cancel(job_id), timeout_s)

    def models(self, timeout_s: float = 5.0) -> list[ModelInfo]:
        """The served models.

        Raises:
            MoselError: the gateway cannot be reached.
        """
        return self._call(calls.models(), timeout_s)

    def load_model(self, name: str, timeout_s: float = LOAD_TIMEOUT_S) -> ModelInfo:
        """Has a model loaded from the server's models folder, or loaded anew; returns when new jobs get it.

        Nothing is interrupted: jobs under way end with what they began with.

        Args:
            name: the model's.
            timeout_s: seconds after which the call is given up; the server goes on.

        Raises:
            ModelNotFound: the folder has no such package.
            PackageError: it is wrong; the model stays as it was.
            MoselError: the kind says what else went wrong (see mosel.errors).
        """
        return self._call(calls.load_model(name), timeout_s)

    def unload_model(self, name: str, timeout_s: float = LOAD_TIMEOUT_S) -> None:
        """Has the server take no more jobs for a model; returns when those under way are over and its memory is free.

        Args:
            name: the model's.
            timeout_s: seconds after which the call is given up; the server goes on.

        Raises:
            ModelNotFound: it is not loaded.
            MoselError: the kind says what else went wrong (see mosel.errors).
        """
        self._call(calls.unload_model(name), timeout_s)

    def observe(
        self, name: str, *, share: float = 1.0, timeout_s: float | None = None
    ) -> Generator[ObserveEvent, None, None]:
        """Has a model run everything that callers send, and tells what cheaper modality sets would have answered.

        It goes on until the iterator is closed; callers wait for nothing, and no floor saves anything meanwhile.

        Args:
            name: the model's.
            share: of the items that are observed, as far as there is time for them.
            timeout_s: seconds after which the call is given up; None: never.

        Yields:
            The first event at once, others a few times a second.

        Raises:
            ModelNotFound: it is not loaded.
            Unreachable: somebody observes it already, or it was loaded anew or unloaded meanwhile.
            MoselError: the kind says what else went wrong (see mosel.errors).
        """
        return self._observed(
            calls.observe(name, share), None if timeout_s is None else seconds("timeout_s", timeout_s)
        )

    def status(self, timeout_s: float = 5.0) -> list[ServiceInfo]:
        """The state of every service.

        Raises:
            MoselError: the gateway cannot be reached.
        """
        return self._call(calls.status(), timeout_s)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _call(self, call: UnaryCall[Found], timeout_s: float) -> Found:
        attempts = self._connection.attempts(call.request, timeout_s)
        method = getattr(self._stub, call.method)
        while True:
            try:
                reply = method(call.request, timeout=attempts.begin(), metadata=self._connection.metadata)
            except grpc.RpcError as error:
                if (wait_s := attempts.wait_s(error)) is None:
                    raise self._connection.error(error, call.instead) from None
            else:
                return call.read(reply)
            time.sleep(wait_s)

    def _events(
        self, upload: Upload, requests: Iterator[gateway_pb2.SubmitJobRequest], timeout_s: float
    ) -> Generator[JobEvent, None, None]:
        call = self._stub.SubmitJob(requests, timeout=timeout_s, metadata=self._connection.metadata)
        try:
            yield from map(event_from, call)
        except grpc.RpcError as error:
            raise upload.error or self._connection.error(error) from None
        finally:
            call.cancel()

    def _observed(
        self, request: gateway_pb2.ObserveRequest, timeout_s: float | None
    ) -> Generator[ObserveEvent, None, None]:
        call = self._stub.Observe(request, timeout=timeout_s, metadata=self._connection.metadata)
        try:
            yield from map(observed_from, call)
        except grpc.RpcError as error:
            raise self._connection.error(error) from None
        finally:
            call.cancel()
