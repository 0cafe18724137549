"""Certificates and keys: good ones become credentials, and of bad ones the message says which file and why."""

from pathlib import Path

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from mosel.errors import ConfigError
from mosel.tls import ServerTls, Tls


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    certificate, other = ca.issue_cert("127.0.0.1"), ca.issue_cert("localhost")
    files = {
        "ca.pem": ca.cert_pem.bytes(),
        "certificate.pem": certificate.cert_chain_pems[0].bytes(),
        "key.pem": certificate.private_key_pem.bytes(),
        "other-key.pem": other.private_key_pem.bytes(),
        "encrypted-key.pem": _encrypted(certificate.private_key_pem.bytes()),
        "open-key.pem": certificate.private_key_pem.bytes(),
        "binary": b"\xff\x00",
        "text": "Schlüssel".encode(),
        "with-text.pem": "Aussteller: Müller\n".encode() + ca.cert_pem.bytes(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    (folder / "open-key.pem").chmod(0o640)
    return folder


def _encrypted(key: bytes) -> bytes:
    return serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
    )


def test_good_files_become_credentials(folder: Path) -> None:
    pair = folder / "certificate.pem", folder / "key.pem"
    assert isinstance(ServerTls("tls", *pair).server_credentials(), grpc.ServerCredentials)
    assert isinstance(ServerTls("tls", *pair, folder / "ca.pem").server_credentials(), grpc.ServerCredentials)
    for tls in (Tls(), Tls(folder / "ca.pem"), Tls(folder / "ca.pem", *pair), Tls(None, *pair)):
        assert isinstance(tls.channel_credentials(), grpc.ChannelCredentials)


def test_paths_may_be_strings_and_nothing_else(folder: Path) -> None:
    tls = Tls(str(folder / "ca.pem"), str(folder / "certificate.pem"), str(folder / "key.pem"))
    assert isinstance(tls.channel_credentials(), grpc.ChannelCredentials)
    with pytest.raises(ConfigError, match=r"^tls\.ca is a bytes; expected the path of a PEM file, or None$"):
        Tls((folder / "ca.pem").read_bytes())  # type: ignore[arg-type]


def test_words_beside_a_certificate_are_no_error(folder: Path) -> None:
    assert isinstance(Tls(folder / "with-text.pem").channel_credentials(), grpc.ChannelCredentials)


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        ("missing", "key.pem", "tls.certificate: {folder}/missing: No such file or directory"),
        ("binary", "key.pem", "tls.certificate: {folder}/binary holds no certificates; expected a PEM file with some"),
        ("text", "key.pem", "tls.certificate: {folder}/text holds no certificates; expected a PEM file with some"),
        ("key.pem", "key.pem", "tls.certificate: {folder}/key.pem holds no certificates; expected a PEM file"),
        ("certificate.pem", "missing", "tls.key: {folder}/missing: No such file or directory"),
        ("certificate.pem", "", "tls.key: {folder}: Is a directory"),
        ("certificate.pem", "text", "tls.key: {folder}/text holds no private key; expected the one of {folder}/cert"),
        ("certificate.pem", "certificate.pem", "tls.key: {folder}/certificate.pem holds no private key"),
        ("certificate.pem", "other-key.pem", "tls.key: {folder}/other-key.pem belongs to another certificate"),
        ("certificate.pem", "encrypted-key.pem", "tls.key: {folder}/encrypted-key.pem needs a passphrase"),
        ("certificate.pem", "open-key.pem", "tls.key: {folder}/open-key.pem has mode 0640, so that others may use it"),
    ],
)
def test_a_message_names_the_setting_the_file_and_what_is_wrong(
    folder: Path, certificate: str, key: str, says: str
) -> None:
    expected = says.format(folder=folder)
    with pytest.raises(ConfigError) as server:
        ServerTls("tls", folder / certificate, folder / key).server_credentials()
    with pytest.raises(ConfigError) as client:
        Tls(folder / "ca.pem", folder / certificate, folder / key).channel_credentials()
    assert str(server.value).startswith(expected)
    assert str(client.value).startswith(expected)


def test_authorities_are_named_as_their_setting(folder: Path) -> None:
    pair = folder / "certificate.pem", folder / "key.pem"
    with pytest.raises(ConfigError, match=r"^tls\.client_ca: .*/text holds no certificates"):
        ServerTls("tls", *pair, folder / "text").server_credentials()
    with pytest.raises(ConfigError, match=r"^internal_tls\.ca: .*/text holds no certificates"):
        ServerTls("internal_tls", *pair, folder / "text", "internal_tls.ca").server_credentials()
    with pytest.raises(ConfigError, match=r"^internal_tls\.ca: .*/text holds no certificates"):
        Tls(folder / "text").channel_credentials("internal_tls")


def test_a_certificate_without_its_key_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls\.key is missing; expected certificate and key, or neither"):
        Tls(certificate=folder / "certificate.pem")
    with pytest.raises(ConfigError, match=r"tls\.certificate is missing"):
        Tls(key=folder / "key.pem")


@pytest.mark.parametrize(
    ("mode", "mine", "allowed"),
    [
        (0o600, True, True),
        (0o400, True, True),
        (0o640, True, False),
        (0o604, True, False),
        (0o620, True, False),
        (0o440, False, True),
        (0o460, False, False),
        (0o444, False, False),
    ],
)
def test_a_key_may_come_from_another_owner_through_the_group_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, mine: bool, allowed: bool
) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes((folder / "key.pem").read_bytes())
    key.chmod(mode)
    owner = key.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: owner if mine else owner + 1)
    make = ServerTls("tls", folder / "certificate.pem", key).server_credentials
    if allowed:
        assert isinstance(make(), grpc.ServerCredentials)
    else:
        with pytest.raises(ConfigError, match=f"has mode {mode:04o}"):
            make()
