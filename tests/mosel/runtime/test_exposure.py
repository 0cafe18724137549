"""Which addresses other machines can reach, and what it takes to listen there."""

from pathlib import Path
from typing import Any

import pytest

from mosel.config import Settings, load_settings
from mosel.errors import ConfigError
from mosel.runtime.exposure import check_public, internal_client_tls, internal_server_tls, is_local, public_tls
from mosel.tls import ServerTls, Tls

LOCAL = ["127.0.0.1:8001", "127.8.9.1:0", "localhost:8001", "[::1]:8001", "::1:8001", "unix:/run/x.sock"]
OPEN = [
    "0.0.0.0:8001",
    "[::]:8001",
    "10.0.0.7:8001",
    ":8001",
    "",
    "example.org:8001",
    "localhost.example.org:1",
    "[::ffff:10.0.0.1]:1",
    "dns:///127.0.0.1:1",
    "unix-abstract:x",
]
TLS = {"certificate": "c.pem", "key": "k.pem"}
INTERNAL = TLS | {"ca": "ca.pem"}
TOKENS = {"tokens_file": "tokens.toml"}


@pytest.mark.parametrize(("addresses", "local"), [(LOCAL, True), (OPEN, False)])
def test_what_only_this_machine_can_reach(addresses: list[str], local: bool) -> None:
    assert {address: is_local(address) for address in addresses} == dict.fromkeys(addresses, local)


@pytest.mark.parametrize("address", LOCAL)
def test_nothing_is_needed_on_this_machine(address: str) -> None:
    check_public(load_settings(), address, "--host")
    assert internal_server_tls(load_settings(), address, "--listen") is None
    assert internal_client_tls(load_settings(), address) is None


@pytest.mark.parametrize(
    ("flags", "missing"),
    [
        ({}, r"no TLS \(--tls-certificate and --tls-key\), no tokens \(--tokens\)"),
        ({"gateway": TOKENS}, r"no TLS \(--tls-certificate and --tls-key\)"),
        ({"tls": TLS}, r"no tokens \(--tokens\)"),
        ({"tls": TLS | {"client_ca": "ca.pem"}}, r"no tokens \(--tokens\)"),
        ({"internal_tls": INTERNAL, "gateway": TOKENS}, r"no TLS \(--tls-certificate and --tls-key\)"),
    ],
)
@pytest.mark.parametrize("address", OPEN)
def test_a_public_port_takes_tls_and_tokens_or_somebody_s_word(
    address: str, flags: dict[str, Any], missing: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^--host: other machines can reach .*, and there is {missing}: turn both"):
        check_public(load_settings(**flags), address, "--host")
    check_public(with_insecure(flags), address, "--host")


def test_with_both_it_may_listen_anywhere() -> None:
    settings = load_settings(tls=TLS, gateway=TOKENS)
    for address in OPEN:
        check_public(settings, address, "--host")


@pytest.mark.parametrize("address", OPEN)
def test_services_on_a_network_take_mutual_tls_on_both_sides_or_somebody_s_word(address: str) -> None:
    for flags in ({}, {"tls": TLS, "gateway": TOKENS}):
        with pytest.raises(ConfigError, match=r"^fusion\.address: .* is on a network, and there is no internal_tls"):
            internal_server_tls(load_settings(**flags), address, "fusion.address")
        with pytest.raises(ConfigError, match="is on a network, and there is no internal_tls"):
            internal_client_tls(load_settings(**flags), address)
        assert internal_server_tls(with_insecure(flags), address, "fusion.address") is None
        assert internal_client_tls(with_insecure(flags), address) is None


@pytest.mark.parametrize("address", ["10.0.0.7:7000", "127.0.0.1:7000"])
def test_internal_tls_is_used_wherever_there_is_tcp(address: str) -> None:
    settings = load_settings(internal_tls=INTERNAL)
    certificate, key, ca = Path("c.pem"), Path("k.pem"), Path("ca.pem")
    expected = ServerTls("internal_tls", certificate, key, ca, "internal_tls.ca")
    assert internal_server_tls(settings, address, "--listen") == expected
    assert internal_client_tls(settings, address) == Tls(ca, certificate, key)
    assert internal_server_tls(settings, "unix:/x", "--listen") is None
    assert internal_client_tls(settings, "unix:/x") is None


def test_public_ports_have_a_certificate_of_their_own() -> None:
    assert public_tls(load_settings(internal_tls=INTERNAL)) is None
    assert public_tls(load_settings(tls=TLS)) == ServerTls("tls", Path("c.pem"), Path("k.pem"))
    mutual = public_tls(load_settings(tls=TLS | {"client_ca": "ca.pem"}))
    assert mutual == ServerTls("tls", Path("c.pem"), Path("k.pem"), Path("ca.pem"))


def with_insecure(flags: dict[str, Any]) -> Settings:
    return load_settings(**flags | {"gateway": {"insecure": True, **flags.get("gateway", {})}})
