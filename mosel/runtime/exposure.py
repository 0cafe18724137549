"""Who can reach an address, and what protects it: TLS, tokens, or somebody's word that nothing needs to."""

import ipaddress

from mosel.config import Settings
from mosel.errors import ConfigError
from mosel.tls import ServerTls, Tls

_REMEDIES = "listen on 127.0.0.1, or say that other machines may come as they are: --insecure (gateway.insecure)"


def is_local(address: str) -> bool:
    """Whether an address, `host:port` or `unix:/path`, can be reached from this machine only."""
    if address.startswith("unix:"):
        return True
    host = host_of(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def host_of(address: str) -> str:
    """The host of `host:port`."""
    return address.rpartition(":")[0].strip("[]")


def check_public(settings: Settings, address: str, setting: str) -> None:
    """Refuses to open a public port to other machines without TLS and tokens.

    Args:
        settings: the effective settings.
        address: where a public port listens.
        setting: the setting or flag that states the address, for messages.

    Raises:
        ConfigError: nothing protects it, and nobody said that nothing needs to.
    """
    missing = [
        text
        for text, there in (
            ("TLS (--tls-certificate and --tls-key)", settings.tls.certificate),
            ("tokens (--tokens)", settings.gateway.tokens_file),
        )
        if not there
    ]
    if missing and not is_local(address) and not settings.gateway.insecure:
        raise ConfigError(
            f"{setting}: other machines can reach {address}, and there is no {', no '.join(missing)}: "
            f"turn both on, {_REMEDIES}"
        )


def public_tls(settings: Settings) -> ServerTls | None:
    """How the public ports show who they are; None: in plain text."""
    tls = settings.tls
    if tls.certificate is None or tls.key is None:
        return None
    return ServerTls("tls", tls.certificate, tls.key, tls.client_ca)


def internal_server_tls(settings: Settings, address: str, setting: str) -> ServerTls | None:
    """How a service that only other services call shows who it is there, and whom it lets in.

    Args:
        settings: the effective settings.
        address: where it listens; None is the answer for a socket, whose folder is private.
        setting: the setting or flag that states the address, for messages.

    Raises:
        ConfigError: other machines could call it, and nobody said that they may.
    """
    tls = settings.internal_tls
    if address.startswith("unix:"):
        return None
    if tls.certificate is None or tls.key is None or tls.ca is None:
        _check_plain(settings, address, setting)
        return None
    return ServerTls("internal_tls", tls.certificate, tls.key, tls.ca, "internal_tls.ca")


def internal_client_tls(settings: Settings, address: str) -> Tls | None:
    """The other side of `internal_server_tls`: None is a channel in plain text."""
    tls = settings.internal_tls
    if address.startswith("unix:"):
        return None
    if tls.certificate is None:
        _check_plain(settings, address, "address of a service")
        return None
    return Tls(tls.ca, tls.certificate, tls.key)


def _check_plain(settings: Settings, address: str, setting: str) -> None:
    if not is_local(address) and not settings.gateway.insecure:
        raise ConfigError(
            f"{setting}: {address} is on a network, and there is no internal_tls: set its certificate, key and ca, "
            f"use sockets (unix:), {_REMEDIES}"
        )
