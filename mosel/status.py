"""Errors on the wire: the tables from error to gRPC status and to HTTP status, and the way back from gRPC."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import cast

import grpc

from mosel.errors import (
    Cancelled,
    DeadlineExceeded,
    DeadlineUnreachable,
    FloorUnreachable,
    InputsNeeded,
    InternalError,
    InvalidRequest,
    JobCancelled,
    JobElsewhere,
    JobNotFound,
    ModelNotFound,
    MoselError,
    Overloaded,
    PackageError,
    PayloadTooLarge,
    PermissionDenied,
    ReadNotProven,
    ServiceUnavailable,
    Unauthenticated,
    Unreachable,
)

RETRY_AFTER = "retry-after-ms"
# The gateway that was asked for a job of another.
_ASKED = "mosel-asked"
# What to send, where more of what the caller has is needed.
_SEND = "mosel-send"
# Of the beginning and of the end of a message, which says what was expected. Each character may take 12 bytes of the
# trailer, which callers read up to 8 KiB of.
_SHOWN_FIRST, _SHOWN_LAST = 300, 300

STATUS: dict[type[MoselError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    PayloadTooLarge: grpc.StatusCode.INVALID_ARGUMENT,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    JobNotFound: grpc.StatusCode.NOT_FOUND,
    JobElsewhere: grpc.StatusCode.NOT_FOUND,
    Unreachable: grpc.StatusCode.FAILED_PRECONDITION,
    FloorUnreachable: grpc.StatusCode.FAILED_PRECONDITION,
    DeadlineUnreachable: grpc.StatusCode.FAILED_PRECONDITION,
    InputsNeeded: grpc.StatusCode.FAILED_PRECONDITION,
    PackageError: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    JobCancelled: grpc.StatusCode.CANCELLED,
    Cancelled: grpc.StatusCode.CANCELLED,
    ServiceUnavailable: grpc.StatusCode.UNAVAILABLE,
    ReadNotProven: grpc.StatusCode.ABORTED,
    InternalError: grpc.StatusCode.INTERNAL,
}


# What grpc itself says, where a setting or the reason would be hard to guess.
_TOO_LARGE = "larger than max"
# Of a call that reached a server which was just ending, or had no more time for it.
_BROKEN_OFF = "CANCELLED"
# What grpc.aio makes of any status that comes while a message of the stream is being sent (grpc/grpc issue 36066).
_STATUS_LOST = "Internal error from Core"
_HANDSHAKE_FAILED = re.compile(r"[Hh]andshake failed.*?OPENSSL_internal:([A-Z_0-9]+(?:: [a-z ]+)?)")
HTTP_STATUS: dict[type[MoselError], int] = {
    InvalidRequest: 400,
    PayloadTooLarge: 413,
    Unauthenticated: 401,
    PermissionDenied: 403,
    ModelNotFound: 404,
    JobNotFound: 404,
    JobElsewhere: 404,
    # Understood, and nothing that could be done: 412 is about conditions in headers.
    Unreachable: 422,
    FloorUnreachable: 422,
    DeadlineUnreachable: 422,
    InputsNeeded: 422,
    Overloaded: 429,
    DeadlineExceeded: 504,
    # Those who get it are others than those who went away; nginx gave it its number.
    JobCancelled: 499,
    Cancelled: 499,
    ServiceUnavailable: 503,
    ReadNotProven: 503,
    InternalError: 500,
    # Of a model that is to be loaded.
    PackageError: 422,
}

# Several errors share a status; the way back takes the first of them.
_ERRORS = {status: error for error, status in reversed(STATUS.items())} | {
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequest,
}
_BY_NUMBER = {int(status.value[0]): status for status in grpc.StatusCode}


def status_of(error: BaseException) -> grpc.StatusCode:
    """The gRPC status of an error; INTERNAL for anything that is not a MoselError."""
    return (
        STATUS.get(type(error), grpc.StatusCode.INTERNAL) if isinstance(error, MoselError) else grpc.StatusCode.INTERNAL
    )


def http_status_of(error: BaseException) -> int:
    """The HTTP status of an error; 500 for anything that is not in the table."""
    return HTTP_STATUS.get(type(error), 500) if isinstance(error, MoselError) else 500


def http_headers_of(error: BaseException) -> dict[str, str]:
    """When to try again, as HTTP says it in seconds and in milliseconds, what is wanted besides; or nothing."""
    if isinstance(error, Unauthenticated):
        return {"www-authenticate": "Bearer"}
    if isinstance(error, InputsNeeded):
        return {_SEND: ",".join(error.modalities)}
    wait_ms = retry_after_ms(error)
    return {"retry-after": str(math.ceil(wait_ms / 1000)), RETRY_AFTER: str(wait_ms)} if wait_ms else {}


def status_number(error: BaseException) -> int:
    """The status as the integer that travels inside a stream's message."""
    return int(status_of(error).value[0])


def message_of(error: BaseException) -> str:
    """What a caller is told of an error."""
    return one_line(str(error))


def one_line(message: str) -> str:
    """A message as one line that can be shown anywhere, whatever a caller had put into it."""
    if len(message) > _SHOWN_FIRST + _SHOWN_LAST:
        message = f"{message[:_SHOWN_FIRST]}...{message[-_SHOWN_LAST:]}"
    return message if message.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)


def retry_after_ms(error: BaseException) -> int:
    """When to try again, in milliseconds; 0 if trying again does not help."""
    return error.retry_after_ms if isinstance(error, Overloaded) else 0


def error_from(status: grpc.StatusCode, message: str, retry_after: int = 0) -> MoselError:
    """The error that a peer's status and message stand for."""
    kind = _ERRORS.get(status, InternalError)
    return Overloaded(message, retry_after) if kind is Overloaded else kind(message)


def error_from_number(number: int, message: str, retry_after: int = 0) -> MoselError:
    """As `error_from`, for a status that travelled as an integer."""
    return error_from(_BY_NUMBER.get(number, grpc.StatusCode.INTERNAL), message, retry_after)


def error_from_rpc(
    error: grpc.RpcError, peer: str, instead: Mapping[type[MoselError], type[MoselError]] | None = None
) -> MoselError:
    """The error behind a failed call.

    Args:
        error: what grpc raised.
        peer: who was called, for messages that grpc itself made.
        instead: what an error means in this call, where several share a status.
    """
    status, details = error.code(), error.details() or ""
    if status is grpc.StatusCode.UNAVAILABLE and not details.startswith("service "):
        failed = _HANDSHAKE_FAILED.search(details)
        return ServiceUnavailable(f"service {peer} is not reachable" + (f": TLS says {failed[1]}" if failed else ""))
    if status is grpc.StatusCode.CANCELLED and details == _BROKEN_OFF:
        return ServiceUnavailable(f"service {peer} stopped before it answered")
    if status is grpc.StatusCode.INTERNAL and details == _STATUS_LOST:
        return ServiceUnavailable(f"service {peer} ended the call while it was being sent, and grpc lost the reason")
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in details:
        return PayloadTooLarge(f"{details} (setting transport.max_message_mib): send fewer items")
    found = error_from(status, details or f"service {peer} answered {status.name}", retry_hint_ms(error))
    if send := _trailers(error).get(_SEND):
        return InputsNeeded(str(found), send.split(","))
    meant = (instead or {}).get(type(found))
    return meant(str(found)) if meant else found


def trailers_of(error: MoselError) -> tuple[tuple[str, str], ...]:
    """What the status of an error cannot say."""
    if isinstance(error, JobElsewhere):
        return ((_ASKED, error.asked),)
    if isinstance(error, InputsNeeded):
        return ((_SEND, ",".join(error.modalities)),)
    wait_ms = retry_after_ms(error)
    return ((RETRY_AFTER, str(wait_ms)),) if wait_ms else ()


def retry_hint_ms(error: grpc.RpcError) -> int:
    """When to make a failed call again, in milliseconds, as the server said; 0 if it did not."""
    return int(_trailers(error).get(RETRY_AFTER, 0))


def asked_gateway(error: grpc.RpcError) -> str:
    """The gateway that was asked for a job of another, by name; empty if that is not why a call failed."""
    return _trailers(error).get(_ASKED, "")


def _trailers(error: grpc.RpcError) -> dict[str, str]:
    return {pair[0]: pair[1] for pair in cast(Iterable[tuple[str, str]], error.trailing_metadata() or ())}
