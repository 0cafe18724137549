"""Who is let in, who is not, and that every slot comes back, in whatever order calls come and go."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.access.caller import caller
from gateway.access.guard import Guard
from gateway.access.tenants import Tenant, hash_of, new_token
from mosel.errors import Overloaded, PermissionDenied, Unauthenticated

TOKENS = {name: new_token() for name in ("alice", "bob")}


def tenant(name: str = "alice", **limits: Any) -> Tenant:
    return Tenant(token_sha256=(hash_of(TOKENS[name]),), **limits)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def guard_of(clock: Callable[[], float] | None = None, **limits: Any) -> Guard:
    return Guard({"alice": tenant(**limits), "bob": tenant("bob", admin=True)}, Counter(), clock or Clock())


def test_a_known_token_says_who_calls() -> None:
    guard = guard_of()
    assert guard.identify([f"Bearer {TOKENS['alice']}"]) == "alice"
    assert guard.identify([f"bearer {TOKENS['bob']}"]) == "bob"


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ([], "header authorization is missing; expected 'Bearer' and a token"),
        (["Bearer a", "Bearer b"], "header authorization is there more than once"),
        ([""], "header authorization has another form"),
        (["Bearer"], "header authorization has another form"),
        (["Bearer "], "header authorization has another form"),
        (["Basic YWxpY2U6"], "header authorization has another form"),
        ([TOKENS["alice"]], "header authorization has another form"),
        ([f"Bearer {'x' * 257}"], "header authorization has another form"),
        (["Bearer wrong"], "header authorization has a token that is not known"),
        ([f"Bearer {hash_of(TOKENS['alice'])}"], "header authorization has a token that is not known"),
        ([f"Bearer {TOKENS['alice']} "], "header authorization has a token that is not known"),
        ([f"Bearer {TOKENS['alice'][:-1]}"], "header authorization has a token that is not known"),
        (["Bearer \u00e4\u20ac"], "header authorization has a token that is not known"),
    ],
)
def test_anything_else_is_refused_without_a_word_of_what_was_sent(headers: list[str], says: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        guard_of().identify(headers)
    assert str(refused.value).startswith(says)
    for header in headers:
        secret = header.partition(" ")[2]
        assert not secret.strip() or len(secret) < 3 or secret not in str(refused.value)


def test_only_an_admin_may_do_what_only_admins_may() -> None:
    guard = guard_of()
    guard.check_admin("bob", "Load")
    with pytest.raises(PermissionDenied, match="tenant alice is no admin; expected the token of one for Load"):
        guard.check_admin("alice", "Load")


def test_inside_a_call_its_tenant_is_the_caller() -> None:
    guard = guard_of()
    assert caller() is None
    with guard.enter("alice"):
        assert caller() == "alice"
    assert caller() is None


def test_limits_bind_each_tenant_alone() -> None:
    guard = guard_of(max_concurrent=1)
    with guard.enter("alice"), guard.enter("bob"), guard.enter("bob"):
        with pytest.raises(Overloaded, match="tenant alice has reached its max_concurrent of 1 calls"):
            guard.check("alice")
        assert guard.statistics() == {"under_way.alice": 1, "under_way.bob": 2}
    guard.check("alice")


def test_a_payload_may_be_larger_than_the_rate_and_the_next_ones_wait_for_it() -> None:
    clock = Clock()
    guard = guard_of(clock, payload_bytes_per_s=1000)
    with guard.enter("alice", 5000):
        pass
    with pytest.raises(Overloaded, match=r"alice is beyond its payload_bytes_per_s of 1000; try again in 4000 ms") as r:
        guard.check("alice")
    assert r.value.retry_after_ms == 4000
    clock.now += 4
    with guard.enter("alice") as count:
        count(3000)
        count(3000)
    with pytest.raises(Overloaded) as again:
        guard.check("alice")
    assert again.value.retry_after_ms == 6000


def test_messages_of_a_stream_count_as_payloads_and_as_requests_where_they_are_some() -> None:
    clock = Clock()
    guard = guard_of(clock, payload_bytes_per_s=1000, requests_per_s=1, burst=3)
    with guard.enter("alice"):
        guard.charge("alice", 500)
        guard.charge("alice", 100, 1)
        guard.charge("alice", 100, 1)
        with pytest.raises(Overloaded, match="requests_per_s of 1; try again in 1000 ms"):
            guard.charge("alice", 100, 1)
        guard.charge("alice", 1300)
        with pytest.raises(Overloaded, match="payload_bytes_per_s of 1000; try again in 1000 ms"):
            guard.charge("alice", 1)


def test_the_time_to_wait_is_that_of_the_slowest_limit() -> None:
    guard = guard_of(payload_bytes_per_s=1000, requests_per_s=0.1)
    with guard.enter("alice", 1500):
        pass
    with pytest.raises(Overloaded, match=r"requests_per_s of 0\.1; try again in 10000 ms"):
        guard.check("alice")


@given(
    st.floats(0.01, 1e4),
    st.integers(1, 50),
    st.floats(1, 1e6),
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 100_000)), min_size=1, max_size=60),
)
def test_after_the_time_that_it_was_told_to_wait_a_caller_is_let_in(
    rate: float, burst: int, bytes_per_s: float, requests: list[tuple[float, int]]
) -> None:
    clock = Clock()
    guard = guard_of(clock, requests_per_s=rate, burst=burst, payload_bytes_per_s=bytes_per_s, max_concurrent=1)
    for pause, nbytes in requests:
        clock.now += pause
        try:
            guard.check("alice")
        except Overloaded as told:
            clock.now += told.retry_after_ms / 1000
        with guard.enter("alice", nbytes):
            pass


@given(
    st.floats(0.1, 1000),
    st.integers(1, 20),
    st.lists(st.floats(0, 2), min_size=1, max_size=80),
)
def test_never_more_requests_than_rate_and_burst_allow(rate: float, burst: int, pauses: list[float]) -> None:
    clock = Clock()
    guard = guard_of(clock, requests_per_s=rate, burst=burst)
    let_in: list[float] = []
    for pause in pauses:
        clock.now += pause
        with contextlib.suppress(Overloaded), guard.enter("alice"):
            let_in.append(clock.now)
    for i, first in enumerate(let_in):
        for j in range(i, len(let_in)):
            assert j - i + 1 <= burst + rate * (let_in[j] - first) + 1e-3


def test_replaced_tenants_are_known_at_once_and_those_who_are_gone_are_not() -> None:
    guard = guard_of()
    with guard.enter("alice"):
        guard.replace({"bob": tenant("bob")})
        with pytest.raises(Unauthenticated, match="a token that is not known"):
            guard.identify([f"Bearer {TOKENS['alice']}"])
        with pytest.raises(Unauthenticated, match="tenant alice is not known any more"):
            guard.charge("alice", 1)
        with pytest.raises(PermissionDenied):
            guard.check_admin("bob", "Load")
    guard.replace({"bob": tenant("bob")})
    assert "under_way.alice" not in guard.statistics()


def test_other_limits_do_not_forgive_what_was_used() -> None:
    guard = guard_of(max_concurrent=2, requests_per_s=0.001, burst=2)
    with guard.enter("alice"), guard.enter("alice"):
        guard.replace({"alice": tenant(max_concurrent=2, requests_per_s=0.001, burst=5)})
        with pytest.raises(Overloaded, match="max_concurrent"):
            guard.check("alice")
    with pytest.raises(Overloaded, match="requests_per_s"):
        guard.check("alice")
    guard.replace({"alice": tenant()})
    guard.check("alice")


@pytest.mark.parametrize(
    ("error", "name", "counter"),
    [
        (Unauthenticated("no"), "", "refused.unauthenticated"),
        (PermissionDenied("no"), "alice", "refused.permission"),
        (Overloaded("no"), "alice", "refused.quota.alice"),
    ],
)
def test_what_is_refused_is_counted_and_logged(
    caplog: pytest.LogCaptureFixture, error: Any, name: str, counter: str
) -> None:
    counters: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING):
        Guard({}, counters).refused(error, "ipv4:10.0.0.1:5", "/a/" + "b" * 1000, name)
    assert counters == {counter: 1}
    (record,) = caplog.records
    fields = vars(record)
    assert (fields["reason"], fields["peer"], fields["tenant"]) == ("no", "ipv4:10.0.0.1:5", name or None)
    assert fields["method"] == "/a/" + "b" * 197


class Comings(RuleBasedStateMachine):
    """Calls of two tenants come, end, fail and are refused in any order, while time passes and limits change."""

    @initialize(most=st.integers(1, 3), rate=st.one_of(st.none(), st.floats(0.5, 50)))
    def start(self, most: int, rate: float | None) -> None:
        self.clock, self.most = Clock(), {"alice": most, "bob": most}
        self.rate = rate
        # Each call has a context of its own, as each task has.
        self.open: list[tuple[str, AbstractContextManager[object], Context]] = []
        self.guard = Guard({name: self.made(name) for name in TOKENS}, Counter(), self.clock)

    def made(self, name: str) -> Tenant:
        return tenant(name, max_concurrent=self.most[name], requests_per_s=self.rate, payload_bytes_per_s=1000)

    def under_way(self, name: str) -> int:
        return sum(holder == name for holder, _, _ in self.open)

    @rule(name=st.sampled_from([*TOKENS]), nbytes=st.integers(0, 2000))
    def enter(self, name: str, nbytes: int) -> None:
        call, context = self.guard.enter(name, nbytes), copy_context()
        try:
            context.run(call.__enter__)
        except Overloaded:
            return
        assert self.under_way(name) < self.most[name]
        self.open.append((name, call, context))

    @precondition(lambda self: self.open)
    @rule(which=st.randoms(), error=st.sampled_from([None, ValueError(), KeyboardInterrupt(), Overloaded("inside")]))
    def leave(self, which: Any, error: BaseException | None) -> None:
        _, call, context = self.open.pop(which.randrange(len(self.open)))
        # Not swallowed, whatever it is.
        assert not context.run(call.__exit__, type(error) if error else None, error, None)

    @rule(name=st.sampled_from([*TOKENS]), nbytes=st.integers(0, 2000), requests=st.integers(0, 1))
    def charge(self, name: str, nbytes: int, requests: int) -> None:
        with contextlib.suppress(Overloaded):
            self.guard.charge(name, nbytes, requests)

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(name=st.sampled_from([*TOKENS]), most=st.integers(1, 3))
    def limit(self, name: str, most: int) -> None:
        self.most[name] = most
        self.guard.replace({name: self.made(name) for name in TOKENS})

    @invariant()
    def what_is_held_is_what_is_under_way(self) -> None:
        if not hasattr(self, "guard"):
            return
        held = self.guard.statistics()
        for name in TOKENS:
            assert held.get(f"under_way.{name}", 0) == self.under_way(name)

    def teardown(self) -> None:
        for _, call, context in getattr(self, "open", []):
            context.run(call.__exit__, None, None, None)
        if hasattr(self, "guard"):
            assert not any(self.guard.statistics().values())


TestNoSlotLeaks = Comings.TestCase
