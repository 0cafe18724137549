"""The tokens file: what it may hold, who may read it, how it is added to; and how the tenant of a token is found."""

import hashlib
import hmac
import tomllib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from gateway.access.tenants import Tenant, find_tenant, hash_of, new_token, read_tenants
from mosel.errors import ConfigError

HASH, OTHER = hash_of("one"), hash_of("other")
Run = Callable[..., CompletedProcess[str]]


def write(folder: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "tokens.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def test_everything_that_a_tenant_may_have(tmp_path: Path) -> None:
    content = f"""
        [alice]
        token_sha256 = ["{HASH}", "{OTHER}"]
        admin = true
        requests_per_s = 2.5
        burst = 7
        max_concurrent = 3
        payload_bytes_per_s = 1e6
        max_accuracy_loss = 0.02

        [bob_2-x]
        token_sha256 = "{hash_of("third")}"
    """
    tenants = read_tenants(write(tmp_path, content))
    assert tenants["alice"] == Tenant(
        token_sha256=(HASH, OTHER),
        admin=True,
        requests_per_s=2.5,
        burst=7,
        max_concurrent=3,
        payload_bytes_per_s=1e6,
        max_accuracy_loss=0.02,
    )
    assert tenants["bob_2-x"] == Tenant(token_sha256=(hash_of("third"),))
    assert [tenant.most_at_once for tenant in tenants.values()] == [7, 1]
    assert Tenant(token_sha256=(HASH,), requests_per_s=2.5).most_at_once == 3


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "names no tenant; `mosel token NAME --file {path}` adds one"),
        ("[alice", "Expected ']' at the end of a table declaration"),
        (b"\xff", "'utf-8' codec can't decode byte"),
        ("[alice]", "alice.token_sha256: Field required"),
        (f'alice = "{HASH}"', "alice: Input should be a valid dictionary"),
        ("[alice]\ntoken_sha256 = []", "alice.token_sha256: Tuple should have at least 1 item"),
        (f'[alice]\ntoken_sha256 = "{HASH[:-1]}"', "alice.token_sha256.0: String should match pattern"),
        (f'[alice]\ntoken_sha256 = "{HASH.upper()}"', "alice.token_sha256.0: String should match pattern"),
        (f'[alice]\ntoken_sha256 = "{HASH}"\ntoken = "a"', "alice.token: Extra inputs are not permitted"),
        (f'[alice]\ntoken_sha256 = "{HASH}"\nburst = 0', "alice.burst: Input should be greater than or equal to 1"),
        (f'[alice]\ntoken_sha256 = "{HASH}"\nrequests_per_s = inf', "alice.requests_per_s: Input should be a finite"),
        (
            f'[alice]\ntoken_sha256 = "{HASH}"\nmax_accuracy_loss = 2',
            "alice.max_accuracy_loss: Input should be less than",
        ),
        (
            f'[alice]\ntoken_sha256 = "{HASH}"\nmax_accuracy_loss = nan',
            "alice.max_accuracy_loss: Input should be a finite",
        ),
        (f'["al ice"]\ntoken_sha256 = "{HASH}"', "al ice.[key]: String should match pattern"),
        (f'["a\\nb"]\ntoken_sha256 = "{HASH}"', "a\nb.[key]: String should match pattern"),
        (
            f'[alice]\ntoken_sha256 = "{HASH}"\n[bob]\ntoken_sha256 = ["{OTHER}", "{HASH}"]',
            "alice and bob have the same token; expected others",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_place_and_without_any_hash(
    tmp_path: Path, content: str | bytes, says: str
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as refused:
        read_tenants(path)
    message = str(refused.value)
    assert message.startswith(f"gateway.tokens_file: {path}")
    assert says.format(path=path) in message
    assert HASH[:20] not in message.lower()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_file_that_others_can_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, f'[alice]\ntoken_sha256 = "{HASH}"', mode)
    with pytest.raises(ConfigError, match=rf"tokens\.toml has mode {mode:04o}, .*; expected .*: chmod 600"):
        read_tenants(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.tokens_file: .*/nowhere: No such file or directory"):
        read_tenants(tmp_path / "nowhere")


def test_every_hash_is_compared_whichever_token_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [new_token() for _ in range(6)]
    tenants = {str(i): Tenant(token_sha256=(hash_of(tokens[i]), hash_of(tokens[i + 3]))) for i in range(3)}
    compared: list[str] = []
    real = hmac.compare_digest

    def counting(given: str, known: str) -> bool:
        compared.append(known)
        return real(given, known)

    monkeypatch.setattr("hmac.compare_digest", counting)
    for i, token in enumerate([*tokens, "none"]):
        compared.clear()
        assert find_tenant(tenants, token) == (str(i % 3) if i < 6 else None)
        assert sorted(compared) == sorted(map(hash_of, tokens))


def test_tokens_are_random_long_and_kept_as_their_sha256() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(token.startswith("mosel_") and len(token) == 49 for token in tokens)
    token = tokens.pop()
    assert hash_of(token) == hashlib.sha256(token.encode()).hexdigest()


def test_the_command_makes_a_token_and_adds_its_hash_to_the_file(run_mosel: Run, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    alice = run_mosel("token", "alice", "--admin", "--file", str(path))
    limits = ("--requests-per-s", "5", "--burst", "9", "--max-concurrent", "2", "--payload-bytes-per-s", "1000")
    bob = run_mosel("token", "bob", *limits, "--max-accuracy-loss", "0.02", "--file", str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    tenants = read_tenants(path)
    assert find_tenant(tenants, alice.stdout.strip()) == "alice"
    assert find_tenant(tenants, bob.stdout.strip()) == "bob"
    assert tenants["alice"].admin
    assert tenants["bob"] == Tenant(
        token_sha256=(hash_of(bob.stdout.strip()),),
        requests_per_s=5,
        burst=9,
        max_concurrent=2,
        payload_bytes_per_s=1000,
        max_accuracy_loss=0.02,
    )
    for made in (alice, bob):
        assert made.stdout.strip() not in path.read_text() + made.stderr

    again = run_mosel("token", "alice", "--file", str(path))
    assert (again.returncode, again.stdout) == (1, "")
    assert "has a tenant alice already; for a second token make one without --file" in again.stderr


def test_without_a_file_it_shows_what_to_add(run_mosel: Run, tmp_path: Path) -> None:
    made = run_mosel("token", "alice", "--max-concurrent", "4")
    entry = made.stderr[made.stderr.index("[") :].partition("\n\n")[0]
    assert tomllib.loads(entry) == {"alice": {"token_sha256": [hash_of(made.stdout.strip())], "max_concurrent": 4}}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["al ice"], "error: tenant: al ice.[key]: String should match pattern '^[A-Za-z0-9_-]{1,64}$'"),
        (["alice", "--burst", "0"], "error: tenant: alice.burst: Input should be greater than or equal to 1"),
        (["alice", "--requests-per-s", "nan"], "error: tenant: alice.requests_per_s: Input should be a finite number"),
        (["alice", "--file", "/nowhere/tokens.toml"], "error: /nowhere/tokens.toml: No such file or directory"),
    ],
)
def test_the_command_refuses_what_no_file_may_hold(run_mosel: Run, arguments: list[str], says: str) -> None:
    refused = run_mosel("token", *arguments)
    assert (refused.returncode, refused.stdout, refused.stderr.strip()) == (1, "", says)
