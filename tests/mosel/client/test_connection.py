"""How clients show who they are, and whom they trust."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import trustme

from mosel import AsyncClient, Client, Tls
from mosel.errors import ConfigError, InvalidRequest, Overloaded, ServiceUnavailable
from mosel.tls import ServerTls
from tests.mosel.refusing import Refusing

PAYLOADS = {"pen": np.zeros((2, 3), np.float32)}


class Certified:
    """A server's certificate and key, and the authority that signed it, as files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert("localhost")
        self.ca, self.certificate, self.key = folder / "ca.pem", folder / "certificate.pem", folder / "key.pem"
        authority.cert_pem.write_to_path(self.ca)
        certificate.cert_chain_pems[0].write_to_path(self.certificate)
        certificate.private_key_pem.write_to_path(self.key)
        self.key.chmod(0o600)


@pytest.fixture
def certified(tmp_path: Path) -> Certified:
    return Certified(tmp_path)


@pytest.fixture
async def server(certified: Certified) -> AsyncIterator[tuple[Refusing, str, str]]:
    """What it gets, and where it listens in plain text and with TLS."""
    servicer = Refusing()
    server = servicer.server()
    credentials = await asyncio.to_thread(ServerTls("tls", certified.certificate, certified.key).server_credentials)
    plain, tls = server.add_insecure_port("localhost:0"), server.add_secure_port("localhost:0", credentials)
    await server.start()
    yield servicer, f"localhost:{plain}", f"localhost:{tls}"
    await server.stop(None)


async def predict(address: str, kind: str, token: str | None = None, tls: Tls | None = None) -> str:
    """With either client; they are made in a thread, as they read files."""
    if kind == "async":
        async with AsyncClient(address, token=token, tls=tls) as client:
            assert token is None or token not in repr(client._connection)
            return (await client.predict("digits", PAYLOADS)).job_id

    def call() -> str:
        with Client(address, token=token, tls=tls) as client:
            assert token is None or token not in repr(client._connection)
            return client.predict("digits", PAYLOADS).job_id

    return await asyncio.to_thread(call)


KINDS = pytest.mark.parametrize("kind", ["sync", "async"])


@KINDS
async def test_the_token_is_in_every_attempt(server: tuple[Refusing, str, str], kind: str) -> None:
    servicer, address, _ = server
    servicer.errors = [Overloaded("full", 1)]
    assert await predict(address, kind, "se-cret") == "well"
    assert [metadata["authorization"] for metadata in servicer.metadata] == ["Bearer se-cret"] * 2
    assert await predict(address, kind) == "well"
    assert "authorization" not in servicer.metadata[-1]


@pytest.mark.parametrize("token", ["", "two\nlines", "naïve", "a\tb"])
def test_a_token_that_cannot_be_sent_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^token is empty or has characters that cannot be sent") as refused:
        Client("127.0.0.1:1", token=token)
    assert not token or token not in str(refused.value)


@KINDS
async def test_over_tls_whom_the_client_trusts_is_called(
    server: tuple[Refusing, str, str], certified: Certified, kind: str
) -> None:
    servicer, plain, secure = server
    assert await predict(secure, kind, "se-cret", Tls(ca=certified.ca)) == "well"
    assert servicer.metadata[-1]["authorization"] == "Bearer se-cret"
    for address, tls in ((secure, None), (secure, Tls()), (plain, Tls(ca=certified.ca))):
        with pytest.raises(ServiceUnavailable, match=r"^service gateway at localhost:\d+ is not reachable"):
            await predict(address, kind, tls=tls)
    assert len(servicer.requests) == 1


async def test_an_asynchronous_client_with_tls_says_that_it_must_be_entered() -> None:
    client = AsyncClient("127.0.0.1:1", tls=Tls())
    with pytest.raises(InvalidRequest, match=r"^a client with tls was not entered; expected `async with"):
        await client.predict("digits", PAYLOADS)
    with pytest.raises(InvalidRequest, match=r"^a client with tls was not entered; expected `async with"):
        client.submit_job("digits", PAYLOADS)
    await client.close()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tls\.ca: .*ca\.pem"):
        Client("127.0.0.1:1", tls=Tls(ca=tmp_path / "ca.pem"))
