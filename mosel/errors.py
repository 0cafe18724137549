"""The error tree. `mosel/status.py` has the tables from error to gRPC and HTTP status.

    MoselError
    ├── RequestError            the caller's fault
    │   ├── InvalidRequest          a field is wrong                        INVALID_ARGUMENT
    │   ├── PayloadTooLarge         beyond a limit the message names        INVALID_ARGUMENT
    │   ├── Unauthenticated         no token, or none that is known         UNAUTHENTICATED
    │   ├── PermissionDenied        the token does not allow this           PERMISSION_DENIED
    │   ├── ModelNotFound           no such model                           NOT_FOUND
    │   ├── JobNotFound             no such job, or long forgotten          NOT_FOUND
    │   │   └── JobElsewhere        another gateway has it, or had it       NOT_FOUND
    │   └── Unreachable             no modality set is good enough          FAILED_PRECONDITION
    │       ├── FloorUnreachable    not accurate enough                     FAILED_PRECONDITION
    │       ├── DeadlineUnreachable accurate enough, but not fast enough    FAILED_PRECONDITION
    │       └── InputsNeeded        not with what was sent of what there is FAILED_PRECONDITION
    ├── ServiceError            this system's state
    │   ├── Overloaded              a bound is reached; try again later     RESOURCE_EXHAUSTED
    │   ├── DeadlineExceeded        the time the caller gave is over        DEADLINE_EXCEEDED
    │   ├── JobCancelled            somebody ended the job                  CANCELLED
    │   ├── Cancelled               the caller went away                    CANCELLED
    │   ├── ServiceUnavailable      a service that is needed is away        UNAVAILABLE
    │   ├── ReadNotProven           shared bytes changed while being read   ABORTED
    │   └── InternalError           a bug                                   INTERNAL
    └── SetupError              found before anything is served with it
        ├── ConfigError             a setting is wrong
        ├── PackageError            a model package is wrong                FAILED_PRECONDITION
        └── DatasetError            samples cannot be had or are damaged
            └── NoSuchSplit             there are samples, but no such split

Messages are written for the person who reads them: they name the field or setting, what it holds and what was
expected.
"""

from collections.abc import Iterable


class MoselError(Exception):
    """Base of every error that MOSEL raises on purpose."""


class RequestError(MoselError):
    """The request cannot be served as it is."""


class InvalidRequest(RequestError):
    """A field of the request has a wrong name, type, shape or value."""


class PayloadTooLarge(RequestError):
    """The request is beyond a size limit."""


class Unauthenticated(RequestError):
    """The caller did not say who it is, or with a token that is not known."""


class PermissionDenied(RequestError):
    """The caller is known, and may not do this."""


class ModelNotFound(RequestError):
    """The request names a model that is not served here."""


class JobNotFound(RequestError):
    """The request names a job that is not known here, or is over for so long that it was forgotten."""


class JobElsewhere(JobNotFound):
    """The request names a job of another gateway than the one that was asked.

    Args:
        message: which one.
        asked: the name of the gateway that was asked, in hexadecimal digits.
    """

    def __init__(self, message: str, asked: str = "") -> None:
        super().__init__(message)
        self.asked = asked


class Unreachable(RequestError):
    """No modality set meets what the request demands; what a client gets for both kinds below."""


class FloorUnreachable(Unreachable):
    """No modality set that could be run is as accurate as the request demands."""


class DeadlineUnreachable(Unreachable):
    """No modality set that is accurate enough is as fast as the request demands, even on an idle system."""


class InputsNeeded(Unreachable):
    """What was sent does not do, and more of what the caller has would.

    Args:
        message: what was sent, and what to send.
        modalities: what to send.
    """

    def __init__(self, message: str, modalities: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.modalities = tuple(sorted(modalities))


class ServiceError(MoselError):
    """The request is fine, the system cannot answer it now."""


class Overloaded(ServiceError):
    """A queue, pool or arena is at its bound.

    Args:
        message: what is full.
        retry_after_ms: when to try again, in milliseconds.
    """

    def __init__(self, message: str, retry_after_ms: int = 100) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DeadlineExceeded(ServiceError):
    """The time that the caller gave is over."""


class JobCancelled(ServiceError):
    """Somebody ended the job before its answer was there."""


class Cancelled(ServiceError):
    """The caller went away before the answer was there."""


class ServiceUnavailable(ServiceError):
    """A service that the request needs is not there."""


class ReadNotProven(ServiceError):
    """A shared-memory slot was reused, or is no longer there, so what was read is not to be trusted."""


class InternalError(ServiceError):
    """Something that must not happen did."""


class SetupError(MoselError):
    """Found before anything is served with it."""


class ConfigError(SetupError):
    """A setting is unknown or has a wrong value."""


class PackageError(SetupError):
    """A model package is incomplete or contradicts itself."""


class DatasetError(SetupError):
    """Labelled samples cannot be had, or are not what their checksum says."""


class NoSuchSplit(DatasetError):
    """A model's labelled samples have no split of that name."""
