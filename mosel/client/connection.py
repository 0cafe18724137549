"""How clients reach a gateway: address, TLS, token, message limit, and when they try again."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc

from mosel.client.checks import text, whole
from mosel.client.retry import Attempts, Retry
from mosel.errors import InvalidRequest, MoselError
from mosel.status import error_from_rpc
from mosel.tls import Tls

# gRPC counts bytes in 31 bits.
_MOST_MIB = 2047


@dataclass(frozen=True)
class Connection:
    """What `Client` and `AsyncClient` know of their gateway.

    Args:
        address: `host:port` or `unix:/path`.
        token: says who calls, where the gateway asks for it.
        tls: what is trusted; None: plain text.
        max_message_mib: the largest message in either direction.
        retries: which calls are made again; None: none.

    Raises:
        InvalidRequest: the token cannot be sent, or something is of the wrong kind.
    """

    address: str
    token: str | None = field(repr=False)
    tls: Tls | None
    max_message_mib: int
    retries: Retry | None

    def __post_init__(self) -> None:
        text("address", self.address, "host:port or unix:/path")
        whole("max_message_mib", self.max_message_mib, f"1 to {_MOST_MIB}", lambda mib: 1 <= mib <= _MOST_MIB)
        for name, kind in (("token", str), ("tls", Tls), ("retries", Retry)):
            if not isinstance(value := getattr(self, name), kind | None):
                raise InvalidRequest(f"{name} is a {type(value).__name__}; expected a {kind.__name__} or None")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise InvalidRequest("token is empty or has characters that cannot be sent; expected printable ASCII")

    @property
    def options(self) -> list[tuple[str, int | str]]:
        """Of the channel."""
        limit = self.max_message_mib * 1024 * 1024
        return [
            ("grpc.max_send_message_length", limit),
            ("grpc.max_receive_message_length", limit),
            # As short as among the services: a gateway that starts again is found at once.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 100 if self.address.startswith("unix:") else 1_000),
            # Where a name stands for several gateways, calls are spread over all of them.
            ("grpc.lb_policy_name", "round_robin"),
            # With http_proxy set, grpc would look for 127.0.0.1 behind the proxy.
            ("grpc.enable_http_proxy", 0),
        ]

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """Of the channel; None: plain text. Reads the files.

        Raises:
            ConfigError: a file cannot be read, or is not what it should be.
        """
        return None if self.tls is None else self.tls.channel_credentials()

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def attempts(self, request: object, timeout_s: float) -> Attempts:
        """Those of a call that begins now."""
        return Attempts(self.retries, request, timeout_s)

    def error(
        self, error: grpc.RpcError, instead: Mapping[type[MoselError], type[MoselError]] | None = None
    ) -> MoselError:
        """The error behind a failed call; `instead`: what an error means in this call."""
        return error_from_rpc(error, f"gateway at {self.address}", instead)
