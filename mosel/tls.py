"""TLS: the one place that reads certificates and keys (PEM files), and says what is wrong with them."""

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from mosel.errors import ConfigError
from mosel.secret_files import read_file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tls:
    """What a client trusts, and how it shows who it is.

    Args:
        ca: certificates of the authorities that may have signed the server's; None: those that gRPC brings along.
        certificate: the client's own, where the server asks for one, with the chain up to its authority.
        key: the private key of that certificate, without a passphrase, in a file that only this user can read.

    Raises:
        ConfigError: only one of certificate and key is given, or something is no path.

    Example:
        >>> Client("mosel.example.org:8001", token=token, tls=Tls(ca="ca.pem"))
    """

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, str | Path | None):
                raise ConfigError(f"tls.{name} is a {type(value).__name__}; expected the path of a PEM file, or None")
        if (self.certificate is None) != (self.key is None):
            missing = "certificate" if self.certificate is None else "key"
            raise ConfigError(f"tls.{missing} is missing; expected certificate and key, or neither")

    def channel_credentials(self, section: str = "tls") -> grpc.ChannelCredentials:
        """The same as gRPC wants it; reads the files.

        Args:
            section: where the files are named, for messages.

        Raises:
            ConfigError: a file cannot be read, or is not what it should be.
        """
        roots = None if self.ca is None else _read_certificates(Path(self.ca), f"{section}.ca")
        if self.certificate is None or self.key is None:
            return grpc.ssl_channel_credentials(roots)
        certificate, key = _read_pair(Path(self.certificate), Path(self.key), section)
        return grpc.ssl_channel_credentials(roots, key, certificate)


@dataclass(frozen=True)
class ServerTls:
    """How a server shows who it is, and whom it lets in.

    Args:
        section: the settings that name the files, for messages.
        certificate: the server's own, with the chain up to its authority.
        key: its private key, without a passphrase, in a file that only this user can read.
        client_ca: certificates of the authorities that may have signed a client's; None: clients need none.
        client_ca_setting: the setting that names that file.
    """

    section: str
    certificate: Path
    key: Path
    client_ca: Path | None = None
    client_ca_setting: str = "tls.client_ca"

    def server_credentials(self) -> grpc.ServerCredentials:
        """The same as gRPC wants it; reads the files.

        Raises:
            ConfigError: a file cannot be read, or is not what it should be.
        """
        certificate, key = _read_pair(self.certificate, self.key, self.section)
        roots = None if self.client_ca is None else _read_certificates(self.client_ca, self.client_ca_setting)
        return grpc.ssl_server_credentials([(key, certificate)], roots, require_client_auth=roots is not None)

    def ssl_context(self, refused: Callable[[str], None]) -> ssl.SSLContext:
        """The same for asyncio; reads the files.

        Args:
            refused: called with the reason when a handshake fails.

        Raises:
            ConfigError: a file cannot be read, or is not what it should be.
        """
        self.server_credentials()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        context.sslobject_class = _telling(refused)
        return context


def handshake_refused(reason: str) -> None:
    """Logs that TLS did not let a caller in."""
    log.warning("refused", extra={"reason": f"TLS handshake failed: {reason}"})


def _telling(refused: Callable[[str], None]) -> type[ssl.SSLObject]:
    """Connections that say why a handshake failed; asyncio closes them without a word."""

    class Telling(ssl.SSLObject):
        def do_handshake(self) -> None:
            try:
                super().do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                refused(error.reason or "unknown reason")
                raise

    return Telling


def _read_certificates(path: Path, setting: str) -> bytes:
    content = read_file(path, setting)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{setting}: {path} holds no certificates; expected a PEM file with some") from None
    return content


def _read_pair(certificate: Path, key: Path, section: str) -> tuple[bytes, bytes]:
    """The contents of both, once it is clear that they belong together."""
    contents = (
        _read_certificates(certificate, f"{section}.certificate"),
        read_file(key, f"{section}.key", secret=True),
    )

    def refuse_passphrase() -> str:
        raise ConfigError(f"{section}.key: {key} needs a passphrase; expected a private key without one")

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, refuse_passphrase)
    except ssl.SSLError as error:
        why = "belongs to another certificate" if error.reason == "KEY_VALUES_MISMATCH" else "holds no private key"
        raise ConfigError(f"{section}.key: {key} {why}; expected the one of {certificate}") from None
    return contents
