"""Who may call a gateway over HTTP."""

import ssl
from collections.abc import Iterator

import httpx
import pytest

from mosel.launcher import Launcher
from tests.system.access.support import (
    Files,
    counted,
    logged,
)


@pytest.fixture
def https(secured: Launcher, files: Files) -> Iterator[httpx.Client]:
    trusting = ssl.create_default_context(cafile=files.path("public-ca.pem"))
    trusting.load_cert_chain(files.path("caller.pem"), files.path("caller.key"))
    address = f"https://127.0.0.1:{secured.settings.gateway.http_port}"
    with httpx.Client(base_url=address, verify=trusting, trust_env=False, timeout=30) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "token", "status", "counter"),
    [
        ("GET", "/v2", "alice", 200, ""),
        ("GET", "/v2/health/ready", None, 200, ""),
        ("GET", "/v2", None, 401, "refused.unauthenticated"),
        ("GET", "/openapi.json", None, 401, "refused.unauthenticated"),
        ("POST", "/v2/models/fruit/infer", "wrong", 401, "refused.unauthenticated"),
        ("POST", "/v2/repository/models/fruit/load", "alice", 403, "refused.permission"),
        ("POST", "/v2/repository/models/fruit/unload", "alice", 403, "refused.permission"),
        ("POST", "/v2/repository/index", "alice", 200, ""),
        ("POST", "/v2/repository/models/fruit/load", "bob", 200, ""),
    ],
)
def test_over_http_the_same_holds(
    secured: Launcher,
    files: Files,
    https: httpx.Client,
    method: str,
    path: str,
    token: str | None,
    status: int,
    counter: str,
) -> None:
    before, lines = counted(secured).get(counter, 0), len(logged(secured))
    headers = {} if token is None else {"authorization": f"Bearer {files.tokens.get(token, token)}"}
    answer = https.request(method, path, headers=headers, json={} if method == "POST" else None)
    assert answer.status_code == status
    if counter:
        assert counted(secured)[counter] == before + 1
        assert logged(secured)[lines]["method"] == f"{method} {path}"


def test_over_http_quotas_and_handshakes_are_refused_logged_and_counted(
    secured: Launcher, files: Files, https: httpx.Client
) -> None:
    carol = {"authorization": f"Bearer {files.tokens['carol']}"}
    answers = [https.get("/v2", headers=carol) for _ in range(2)]
    assert answers[-1].status_code == 429
    assert 0 < int(answers[-1].headers["retry-after"]) <= 100
    before, lines = counted(secured).get("refused.handshake", 0), len(logged(secured))
    plain = str(https.base_url).replace("https", "http")
    with pytest.raises(httpx.TransportError):
        httpx.get(plain, trust_env=False, headers={"authorization": f"Bearer {files.tokens['alice']}"})
    with pytest.raises(httpx.TransportError):
        httpx.get(
            https.base_url,
            trust_env=False,
            verify=ssl.create_default_context(cafile=files.path("public-ca.pem")),
        )
    assert counted(secured)["refused.handshake"] == before + 2
    reasons = [line["reason"] for line in logged(secured)[lines:]]
    assert reasons == [f"TLS handshake failed: {why}" for why in ("HTTP_REQUEST", "PEER_DID_NOT_RETURN_A_CERTIFICATE")]
