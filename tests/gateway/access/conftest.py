"""Two tenants: alice, whose limits a test states, and bob, who is an admin."""

from collections import Counter
from collections.abc import Callable

import pytest

from gateway.access.guard import Guard
from gateway.access.tenants import Tenant, hash_of, new_token

TOKENS = {"alice": new_token(), "bob": new_token()}


@pytest.fixture
def tokens() -> dict[str, str]:
    """Tokens by tenant."""
    return TOKENS


@pytest.fixture
def counters() -> Counter[str]:
    """What is refused."""
    return Counter()


@pytest.fixture
def make_guard(counters: Counter[str]) -> Callable[..., Guard]:
    """Makes a guard on the real clock; arguments are alice's limits."""

    def make(**limits: float) -> Guard:
        alice = Tenant.model_validate({"token_sha256": hash_of(TOKENS["alice"]), **limits})
        return Guard({"alice": alice, "bob": Tenant(token_sha256=(hash_of(TOKENS["bob"]),), admin=True)}, counters)

    return make
