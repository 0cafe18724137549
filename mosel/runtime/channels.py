"""Channels between the services of this system, and what both ends of a connection agree on."""

from typing import cast

import grpc

from mosel.config import Settings
from mosel.runtime.exposure import internal_client_tls
from mosel.runtime.in_process import InProcessChannel, local_services
from mosel.runtime.messages import limit_bytes


def channel_options(settings: Settings) -> list[tuple[str, int]]:
    """Options of every server and channel: message limits in both directions, no port shared with another process."""
    limit = limit_bytes(settings.transport.max_message_mib)
    return [
        ("grpc.max_send_message_length", limit),
        ("grpc.max_receive_message_length", limit),
        ("grpc.so_reuseport", 0),
        # Also how long one attempt may take: to a host that is cut off, it would be 20 s.
        ("grpc.min_reconnect_backoff_ms", 5_000),
        # A unix socket must not be looked for behind a proxy.
        ("grpc.enable_http_proxy", 0),
    ]


# Callers may ask each second whether a server is there, with and without calls; gRPC itself cuts them off for it.
PINGS_OF_CALLERS = [("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.min_ping_interval_without_data_ms", 500)]


def reconnect_options(address: str) -> list[tuple[str, int]]:
    """When a channel tries again to reach a service that is not there; on one machine, trying costs next to nothing."""
    return [
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 100 if address.startswith("unix:") else 1_000),
    ]


def keepalive_options(address: str) -> list[tuple[str, int]]:
    """Has both ends of a connection between hosts ask each other whether they are there.

    Otherwise calls to a host that was cut off would hang until their deadlines. gRPC's own threads ask and answer, so a
    service that is busy is not taken for one that is gone. On one machine the kernel tells.
    """
    if address.startswith("unix:"):
        return []
    return [
        ("grpc.keepalive_time_ms", 2_000),
        # Both: without the second, an answer is waited for for a minute unless the kernel gives up before.
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.ping_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # What a server puts up with.
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ]


def open_channel(settings: Settings, address: str) -> grpc.aio.Channel:
    """A channel to another service of this system, in this process or elsewhere; the caller closes it.

    Raises:
        ConfigError: it would cross a network in plain text, or a file of `internal_tls` is wrong.
    """
    if local_services.expects(address):
        return cast(grpc.aio.Channel, InProcessChannel(address, channel_options(settings)))
    options, credentials = _options_and_credentials(settings, address)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials, options)


def open_blocking_channel(settings: Settings, address: str) -> grpc.Channel:
    """As `open_channel`, for calls that block a thread of their own."""
    options, credentials = _options_and_credentials(settings, address)
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


def _options_and_credentials(
    settings: Settings, address: str
) -> tuple[list[tuple[str, int]], grpc.ChannelCredentials | None]:
    """Options and credentials; without these, it is plain text."""
    tls = internal_client_tls(settings, address)
    credentials = None if tls is None else tls.channel_credentials("internal_tls")
    return channel_options(settings) + reconnect_options(address) + keepalive_options(address), credentials
