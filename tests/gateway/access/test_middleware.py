"""The guard in front of a real HTTP server, in plain text and with TLS."""

import asyncio
import json
import logging
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from starlette.types import Receive, Scope, Send

from gateway.access.caller import caller
from gateway.access.guard import Guard
from gateway.access.middleware import OnlyTenantsHttp, needs_admin
from mosel.errors import ConfigError
from mosel.runtime.http import HttpServer
from mosel.tls import ServerTls

MakeGuard = Callable[..., Guard]


class App:
    """Answers who called, and how many bytes came; `/wait` and `/fail` do what they say."""

    def __init__(self) -> None:
        self.entered = asyncio.Semaphore(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        nbytes, more = 0, True
        while more:
            message = await receive()
            nbytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        if scope["path"] == "/fail":
            raise ValueError("as asked for")
        if scope["path"] == "/wait":
            self.entered.release()
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        body = json.dumps({"caller": caller(), "bytes": nbytes}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def serve(make_guard: MakeGuard) -> Callable[..., Any]:
    @asynccontextmanager
    async def serving(**limits: float) -> AsyncIterator[tuple[httpx.AsyncClient, Guard, App]]:
        app, guard = App(), make_guard(**limits)
        async with (
            HttpServer(OnlyTenantsHttp(app, guard), "127.0.0.1", 0, "--http-port", 1) as server,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client,
        ):
            yield client, guard, app

    return serving


@pytest.fixture
def alice(tokens: dict[str, str]) -> dict[str, str]:
    return {"authorization": f"Bearer {tokens['alice']}"}


@pytest.fixture
def bob(tokens: dict[str, str]) -> dict[str, str]:
    return {"Authorization": f"bearer {tokens['bob']}"}


async def test_a_tenant_s_requests_go_through_and_are_known_to_be_its(
    serve: Any, alice: dict[str, str], bob: dict[str, str]
) -> None:
    async with serve() as (client, guard, _):
        for _ in range(2):
            answer = await client.post("/v2/models/m/infer", content=b"abc", headers=alice)
            assert (answer.status_code, answer.json()) == (200, {"caller": "alice", "bytes": 3})
        answer = await client.get("/v2", headers=bob)
        assert answer.json() == {"caller": "bob", "bytes": 0}
        assert guard.statistics() == {"under_way.alice": 0, "under_way.bob": 0}


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic YWxpY2U6"])
async def test_without_a_known_token_nothing_answers(
    serve: Any, counters: Counter[str], caplog: pytest.LogCaptureFixture, header: str | None
) -> None:
    caplog.set_level(logging.DEBUG, "gateway")
    async with serve() as (client, _, _):
        headers = {} if header is None else {"authorization": header}
        answer = await client.post("/v2/models/m/infer", content=b"x" * 10_000_000, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"].startswith("header authorization ")
    assert counters == {"refused.unauthenticated": 1}
    (record,) = [vars(record) for record in caplog.records if record.name.startswith("gateway")]
    assert (record["message"], record["method"], record["tenant"]) == ("refused", "POST /v2/models/m/infer", None)
    assert record["peer"].startswith("127.0.0.1:")
    assert "wrong" not in str(record)


async def test_two_headers_are_refused_whichever_is_known(serve: Any, alice: dict[str, str]) -> None:
    async with serve() as (client, _, _):
        both = [("authorization", alice["authorization"]), ("authorization", "Bearer wrong")]
        assert (await client.get("/v2", headers=both)).status_code == 401


async def test_health_needs_no_token(serve: Any) -> None:
    async with serve() as (client, _, _):
        for path, status in (
            ("/v2/health/live", 200),
            ("/v2/health/ready", 200),
            ("/v2/health/live/", 401),
            ("/v2/health", 401),
            ("/v2/models/m/ready", 401),
            ("/openapi.json", 401),
        ):
            assert (await client.get(path)).status_code == status


async def test_only_admins_load_models(
    serve: Any, counters: Counter[str], alice: dict[str, str], bob: dict[str, str]
) -> None:
    async with serve() as (client, _, _):
        for path in ("/v2/repository/models/m/load", "/v2/repository/models/a%2Fb/unload"):
            denied = await client.post(path, headers=alice)
            assert denied.status_code == 403
            assert denied.json()["error"].startswith("tenant alice is no admin; expected the token of one for /v2/repo")
            assert (await client.post(path, headers=bob)).status_code == 200
        assert (await client.post("/v2/repository/index", headers=alice)).status_code == 200
    assert counters == {"refused.permission": 2}


@pytest.mark.parametrize(
    ("path", "admin"),
    [
        ("/v2/repository/models/m/load", True),
        ("/v2/repository/models/m/versions/1/unload", True),
        ("/v2/repository/whatever/comes", True),
        ("/v2/repository/index/", True),
        ("/v2/repository/index", False),
        ("/v2/models/m/infer", False),
    ],
)
def test_what_only_admins_may_do(path: str, admin: bool) -> None:
    assert needs_admin(path) is admin


async def test_beyond_its_limits_a_caller_is_told_when_to_come_back(
    serve: Any, counters: Counter[str], alice: dict[str, str], bob: dict[str, str]
) -> None:
    async with serve(requests_per_s=0.01, burst=2) as (client, _, _):
        for _ in range(2):
            assert (await client.get("/v2", headers=alice)).status_code == 200
        refused = await client.get("/v2", headers=alice)
        assert (await client.get("/v2", headers=bob)).status_code == 200
    assert refused.status_code == 429
    assert refused.json()["error"].startswith("tenant alice is beyond its requests_per_s of 0.01; try again in ")
    assert 90_000 < int(refused.headers["retry-after-ms"]) <= 100_000
    assert 90 < int(refused.headers["retry-after"]) <= 100
    assert counters == {"refused.quota.alice": 1}


@pytest.mark.parametrize("chunked", [False, True])
async def test_payload_bytes_count_as_they_come(serve: Any, alice: dict[str, str], chunked: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 10_000

    async with serve(payload_bytes_per_s=1000) as (client, _, _):
        content = chunks() if chunked else b"x" * 100_000
        answer = await client.post("/v2/models/m/infer", content=content, headers=alice)
        assert answer.json() == {"caller": "alice", "bytes": 100_000}
        refused = await client.post("/v2/models/m/infer", content=b"x", headers=alice)
    assert refused.status_code == 429
    assert 90_000 < int(refused.headers["retry-after-ms"]) <= 100_000


async def test_slots_come_back_from_requests_that_end_fail_or_are_given_up(serve: Any, alice: dict[str, str]) -> None:
    async with serve(max_concurrent=2) as (client, guard, app):
        for _ in range(3):
            waiting = [asyncio.create_task(client.get("/wait", headers=alice)) for _ in range(2)]
            for _ in waiting:
                await app.entered.acquire()
            assert (await client.get("/v2", headers=alice)).status_code == 429
            for task in waiting:
                task.cancel()
            async with asyncio.timeout(30):
                while guard.statistics()["under_way.alice"]:  # noqa: ASYNC110 (the server cannot tell)
                    await asyncio.sleep(0.001)
            assert (await client.get("/fail", headers=alice)).status_code == 500
            assert (await client.get("/v2", headers=alice)).status_code == 200
        assert guard.statistics() == {"under_way.alice": 0}


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, ca = tmp_path_factory.mktemp("certificates"), trustme.CA()
    server, client = ca.issue_cert("127.0.0.1"), ca.issue_cert("client")
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name, certificate in (("server", server), ("client", client)):
        certificate.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        certificate.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        (folder / f"{name}.key").chmod(0o600)
    return folder


@pytest.mark.parametrize("mutual", [False, True])
async def test_tls_lets_in_who_speaks_it_and_says_who_does_not(certificates: Path, mutual: bool) -> None:
    refused: list[str] = []
    ca = certificates / "ca.pem"
    tls = ServerTls("tls", certificates / "server.pem", certificates / "server.key", ca if mutual else None)
    known = ssl.create_default_context(cafile=ca)
    if mutual:
        known.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    without, others = ssl.create_default_context(cafile=ca), ssl.create_default_context()
    app, retries = App(), httpx.AsyncHTTPTransport
    async with HttpServer(app, "127.0.0.1", 0, "--http-port", 1, tls, refused.append) as server:

        async def get(scheme: str, context: ssl.SSLContext) -> dict[str, Any]:
            async with httpx.AsyncClient(transport=retries(verify=context)) as client:
                answer: dict[str, Any] = (await client.get(f"{scheme}://127.0.0.1:{server.port}/v2")).json()
                return answer

        assert await get("https", known) == {"caller": None, "bytes": 0}
        assert refused == []
        with pytest.raises(httpx.TransportError):
            await get("http", known)
        assert refused == ["HTTP_REQUEST"]
        if mutual:
            with pytest.raises(httpx.TransportError):
                await get("https", without)
            assert refused[1:] == ["PEER_DID_NOT_RETURN_A_CERTIFICATE"]
        with pytest.raises(httpx.TransportError):
            await get("https", others)
        assert await get("https", known) == {"caller": None, "bytes": 0}


async def test_a_wrong_file_is_an_error_at_the_start(certificates: Path) -> None:
    tls = ServerTls("tls", certificates / "server.pem", certificates / "client.key")
    with pytest.raises(ConfigError, match=r"^tls\.key: .*/client\.key belongs to another certificate"):
        async with HttpServer(App(), "127.0.0.1", 0, "--http-port", 1, tls):
            pass
