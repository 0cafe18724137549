"""Services with everything turned on, and the files that it takes."""

from collections.abc import Callable, Iterator
from subprocess import CompletedProcess

import pytest
import trustme

from mosel.config import FREE_PORTS, Settings
from mosel.launcher import Launcher
from tests.ports import free_ports
from tests.system.access.support import (
    ENCODERS,
    Files,
)

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, run_mosel: Run) -> Files:
    folder = tmp_path_factory.mktemp("access")
    authorities = {name: trustme.CA() for name in ("public", "internal")}
    for name, ca in authorities.items():
        ca.cert_pem.write_to_path(str(folder / f"{name}-ca.pem"))
    for name, (authority, host) in {
        "gateway": ("public", "127.0.0.1"),
        "caller": ("public", "caller"),
        "service": ("internal", "127.0.0.1"),
    }.items():
        certificate = authorities[authority].issue_cert(host)
        certificate.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        certificate.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        (folder / f"{name}.key").chmod(0o600)
    tenants: dict[str, list[str]] = {
        "alice": [],
        "bob": ["--admin"],
        "carol": ["--requests-per-s", "0.01", "--burst", "1"],
        "erin": ["--requests-per-s", "0.01", "--burst", "2"],
    }
    made = {
        name: run_mosel("token", name, *limits, "--file", str(folder / "tokens.toml")).stdout.strip()
        for name, limits in tenants.items()
    }
    return Files(folder, made)


@pytest.fixture(scope="session")
def secured(files: Files, settings_with: Callable[..., Settings]) -> Iterator[Launcher]:
    """Mutual TLS and tokens on a public address, and mutual TLS between services on TCP."""
    selector, fusion, *encoders = (f"127.0.0.1:{port}" for port in free_ports(2 + len(ENCODERS)))
    settings = settings_with(
        gateway=FREE_PORTS | {"host": "0.0.0.0", "tokens_file": files.path("tokens.toml")},
        tls={
            "certificate": files.path("gateway.pem"),
            "key": files.path("gateway.key"),
            "client_ca": files.path("public-ca.pem"),
        },
        internal_tls={
            "certificate": files.path("service.pem"),
            "key": files.path("service.key"),
            "ca": files.path("internal-ca.pem"),
        },
        selector={"address": selector},
        fusion={"address": fusion},
        encoders={"addresses": dict(zip(ENCODERS, encoders, strict=True))},
    )
    with Launcher(settings) as launcher:
        launcher.wait_ready(120)
        yield launcher
