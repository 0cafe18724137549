"""Errors on the wire."""

from collections.abc import Iterator

import grpc
import pytest

from mosel import errors
from mosel.errors import (
    InputsNeeded,
    InternalError,
    JobNotFound,
    ModelNotFound,
    MoselError,
    Overloaded,
    PackageError,
    PayloadTooLarge,
    RequestError,
    ServiceError,
    ServiceUnavailable,
    Unreachable,
)
from mosel.status import (
    HTTP_STATUS,
    RETRY_AFTER,
    STATUS,
    error_from,
    error_from_number,
    error_from_rpc,
    http_headers_of,
    http_status_of,
    message_of,
    retry_after_ms,
    status_number,
    status_of,
    trailers_of,
)


def leaves(kind: type[MoselError]) -> Iterator[type[MoselError]]:
    """The classes below that have none below themselves; those of tests aside."""
    below = [c for c in kind.__subclasses__() if c.__module__ == errors.__name__]
    if not below:
        yield kind
    for each in below:
        yield from leaves(each)


SERVED = [*leaves(RequestError), *leaves(ServiceError)]


def test_the_table_holds_every_error_that_a_request_can_meet_and_no_other() -> None:
    # Some are what their kinds come back as; a package that is wrong is met when a model is loaded.
    assert set(STATUS) == {*SERVED, JobNotFound, Unreachable, PackageError}


def test_http_has_a_status_for_each_of_them() -> None:
    assert HTTP_STATUS.keys() == STATUS.keys()
    for kind, status in HTTP_STATUS.items():
        assert http_status_of(kind("x")) == status
        assert (status < 500) == (issubclass(kind, RequestError) or status in (422, 429, 499))
    assert http_status_of(ValueError("x")) == http_status_of(errors.ConfigError("x")) == 500


def test_http_says_in_headers_when_to_try_again_and_that_it_wants_a_token() -> None:
    assert http_headers_of(Overloaded("full", 1001)) == {"retry-after": "2", RETRY_AFTER: "1001"}
    assert http_headers_of(Overloaded("full", 1)) == {"retry-after": "1", RETRY_AFTER: "1"}
    assert http_headers_of(Overloaded("full", 0)) == http_headers_of(InternalError("x")) == {}
    assert http_headers_of(errors.Unauthenticated("x")) == {"www-authenticate": "Bearer"}


def test_the_tree_s_picture_names_every_error_with_its_status() -> None:
    assert errors.__doc__ is not None
    lines = errors.__doc__.splitlines()
    for kind, status in STATUS.items():
        assert any(f"── {kind.__name__} " in line and line.endswith(status.name) for line in lines), kind
    assert all(kind.__name__ in errors.__doc__ for kind in leaves(MoselError))


@pytest.mark.parametrize("kind", SERVED)
def test_an_error_comes_back_with_its_status_and_message(kind: type[MoselError]) -> None:
    error = kind("what is wrong")
    back = error_from_number(status_number(error), str(error), retry_after_ms(error))
    assert status_of(back) is status_of(error)
    assert str(back) == "what is wrong"
    assert issubclass(type(back), RequestError) == issubclass(kind, RequestError)


UNAMBIGUOUS = [kind for kind in SERVED if list(STATUS.values()).count(STATUS[kind]) == 1]


@pytest.mark.parametrize("kind", UNAMBIGUOUS)
def test_an_error_with_a_status_of_its_own_comes_back_as_itself(kind: type[MoselError]) -> None:
    assert type(error_from(status_of(kind("x")), "x")) is kind


def test_the_retry_hint_comes_back() -> None:
    error = Overloaded("full", 250)
    back = error_from(status_of(error), "full", retry_after_ms(error))
    assert isinstance(back, Overloaded)
    assert back.retry_after_ms == 250
    assert retry_after_ms(InternalError("x")) == 0


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), errors.ConfigError("x"), MoselError("x")])
def test_whatever_else_goes_wrong_is_internal(error: Exception) -> None:
    assert status_of(error) is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("number", [-1, 2, 15, 99])
def test_a_number_that_no_error_has_is_internal(number: int) -> None:
    assert type(error_from_number(number, "x")) is InternalError


def failed_call(status: grpc.StatusCode, details: str, *trailers: tuple[str, str]) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)


def test_a_failed_call_becomes_the_error_behind_it() -> None:
    error = error_from_rpc(failed_call(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (RETRY_AFTER, "40")), "selector")
    assert isinstance(error, Overloaded)
    assert (str(error), error.retry_after_ms) == ("full", 40)


def test_what_to_send_comes_back() -> None:
    needed = InputsNeeded("send image, audio", ["image", "audio"])
    assert http_headers_of(needed) == {"mosel-send": "audio,image"}
    back = error_from_rpc(failed_call(status_of(needed), str(needed), *trailers_of(needed)), "gateway")
    assert isinstance(back, InputsNeeded)
    assert (str(back), back.modalities) == ("send image, audio", ("audio", "image"))


def test_a_call_may_know_better_which_of_the_errors_of_a_status_it_is() -> None:
    failed = failed_call(grpc.StatusCode.FAILED_PRECONDITION, "model.toml: wrong")
    assert type(error_from_rpc(failed, "selector")) is Unreachable
    meant = error_from_rpc(failed, "selector", {Unreachable: PackageError})
    assert (type(meant), str(meant)) == (PackageError, "model.toml: wrong")
    other = failed_call(grpc.StatusCode.NOT_FOUND, "model.toml: wrong")
    assert type(error_from_rpc(other, "selector", {Unreachable: PackageError})) is ModelNotFound


def test_a_peer_that_is_away_is_named_and_not_by_grpc_s_own_words() -> None:
    unreachable = failed_call(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; unix:/x: No such file")
    error = error_from_rpc(unreachable, "fusion")
    assert isinstance(error, ServiceUnavailable)
    assert str(error) == "service fusion is not reachable"
    broken_off = error_from_rpc(failed_call(grpc.StatusCode.CANCELLED, "CANCELLED"), "fusion")
    assert isinstance(broken_off, ServiceUnavailable)
    assert str(broken_off) == "service fusion stopped before it answered"
    passed_on = failed_call(grpc.StatusCode.UNAVAILABLE, "service encoder/audio went away")
    assert str(error_from_rpc(passed_on, "selector")) == "service encoder/audio went away"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("model is 'pear'; expected one of fruit", "model is 'pear'; expected one of fruit"),
        ("größer als 1 KiB 🍎", "größer als 1 KiB 🍎"),
        ("model is 'a\nb\x1b[31m\u202e'", r"model is 'a\nb\x1b[31m\u202e'"),
    ],
)
def test_a_message_is_one_line_that_can_be_shown_anywhere(given: str, shown: str) -> None:
    assert message_of(InternalError(given)) == shown


def test_a_message_fits_into_a_trailer() -> None:
    shown = message_of(InternalError(f"model is '{'🍎' * 10_000}'; expected one of fruit"))
    assert shown.startswith("model is '🍎")
    assert "🍎...🍎" in shown
    assert shown.endswith("'; expected one of fruit")
    # As gRPC writes it: three characters for each byte.
    assert 3 * len(shown.encode()) < 8 * 1024


TLS_FAILED = (
    "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Tls handshake failed "
    "(TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED: "
    "unable to get local issuer certificate: OK"
)


def test_why_tls_failed_is_said() -> None:
    error = error_from_rpc(failed_call(grpc.StatusCode.UNAVAILABLE, TLS_FAILED), "gateway")
    assert isinstance(error, ServiceUnavailable)
    assert str(error) == (
        "service gateway is not reachable: TLS says CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate"
    )


@pytest.mark.parametrize(
    "side", ["Sent message larger", "Received message larger", "message after decompression larger"]
)
def test_a_message_that_grpc_finds_too_large_is_no_overload_and_the_setting_is_named(side: str) -> None:
    details = f"CLIENT: {side} than max (6291470 vs. 4194304)"
    error = error_from_rpc(failed_call(grpc.StatusCode.RESOURCE_EXHAUSTED, details), "gateway")
    assert isinstance(error, PayloadTooLarge)
    assert str(error) == f"{details} (setting transport.max_message_mib): send fewer items"


def test_a_status_that_grpc_lost_is_no_bug_of_the_peer() -> None:
    failed = failed_call(grpc.StatusCode.INTERNAL, "Internal error from Core")
    error = error_from_rpc(failed, "gateway at here")
    assert isinstance(error, ServiceUnavailable)
    assert str(error) == "service gateway at here ended the call while it was being sent, and grpc lost the reason"
    assert type(error_from_rpc(failed_call(grpc.StatusCode.INTERNAL, "x"), "gateway")) is InternalError
