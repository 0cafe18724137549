"""Who may call what, and how much. Knows neither gRPC nor HTTP."""

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from gateway.access.buckets import TokenBucket
from gateway.access.caller import calling
from gateway.access.tenants import Tenant, Tenants, find_tenant
from mosel.errors import MoselError, Overloaded, PermissionDenied, Unauthenticated

_MAX_TOKEN = 256
# As much of a name from outside is logged.
_SHOWN_METHOD = 200
# When a call ends is not known; this is when to look again.
_LOOK_AGAIN_MS = 100

log = logging.getLogger(__name__)


class _Usage:
    """What a tenant has used of its limits."""

    def __init__(self, name: str, tenant: Tenant, now: float) -> None:
        self.name, self.under_way = name, 0
        self.requests: TokenBucket | None = None
        self.payloads: TokenBucket | None = None
        self.limit(tenant, now)

    def limit(self, tenant: Tenant, now: float) -> None:
        """Sets the limits; what is used stays used."""
        self.tenant = tenant
        self.requests = _limited(self.requests, tenant.requests_per_s, tenant.most_at_once, now)
        rate = tenant.payload_bytes_per_s
        self.payloads = _limited(self.payloads, rate, rate or 0, now)

    def check_call(self, now: float) -> None:
        """Raises Overloaded, with the time to wait, unless one call more is within the limits."""
        most = self.tenant.max_concurrent
        if most is not None and self.under_way >= most:
            raise Overloaded(f"tenant {self.name} has reached its max_concurrent of {most} calls", _LOOK_AGAIN_MS)
        self.check(1, now)

    def check(self, requests: int, now: float) -> None:
        """Raises Overloaded, with the time to wait, unless so many requests more are within the limits."""
        # Payloads are counted once they are there, so that one may be larger than the rate: the next ones wait then.
        limits = ("payload_bytes_per_s", self.payloads, 0), ("requests_per_s", self.requests, requests)
        waits = [(bucket.wait_s(least, now), limit) for limit, bucket, least in limits if bucket is not None]
        wait_s, limit = max(waits, default=(0.0, ""))
        if wait_s:
            wait_ms, most = math.ceil(wait_s * 1000), getattr(self.tenant, limit)
            beyond = f"tenant {self.name} is beyond its {limit} of {most:g}"
            raise Overloaded(f"{beyond}; try again in {wait_ms} ms", wait_ms)

    def take(self, requests: int, nbytes: int, now: float) -> None:
        """Counts requests and bytes."""
        if self.requests is not None and requests:
            self.requests.take(requests, now)
        if self.payloads is not None and nbytes:
            self.payloads.take(nbytes, now)


def _limited(bucket: TokenBucket | None, rate: float | None, capacity: float, now: float) -> TokenBucket | None:
    if rate is None:
        return None
    if bucket is None:
        return TokenBucket(rate, capacity, now)
    bucket.limit(rate, capacity, now)
    return bucket


class Guard:
    """Lets tenants in within their limits; everything else raises an error.

    Args:
        tenants: who may call.
        counters: gets the counts of what is refused, under names that begin with `refused.`.
        clock: seconds that never go back.
    """

    def __init__(self, tenants: Tenants, counters: Counter[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._tenants, self._counters, self._clock = tenants, counters, clock
        self._usage: dict[str, _Usage] = {}

    def replace(self, tenants: Tenants) -> None:
        """Goes on with other tenants; calls under way finish, and who stays keeps what it has used."""
        self._tenants = tenants
        for name in self._usage.keys() & tenants.keys():
            self._usage[name].limit(tenants[name], self._clock())
        self._usage = {name: usage for name, usage in self._usage.items() if name in tenants or usage.under_way}

    def identify(self, authorizations: Sequence[str]) -> str:
        """The name of the tenant that a caller is.

        Args:
            authorizations: the values of the caller's `authorization` headers.

        Raises:
            Unauthenticated: there is not one, or it holds no token that is known.
        """
        if len(authorizations) != 1:
            what = "missing" if not authorizations else "there more than once"
            raise Unauthenticated(f"header authorization is {what}; expected 'Bearer' and a token")
        scheme, _, token = authorizations[0].partition(" ")
        if scheme.lower() != "bearer" or not 0 < len(token) <= _MAX_TOKEN:
            raise Unauthenticated("header authorization has another form; expected 'Bearer' and a token")
        name = find_tenant(self._tenants, token)
        if name is None:
            raise Unauthenticated("header authorization has a token that is not known")
        return name

    def check_admin(self, name: str, method: str) -> None:
        """Raises PermissionDenied unless a tenant is an admin."""
        tenant = self._tenants.get(name)
        if tenant is None or not tenant.admin:
            raise PermissionDenied(f"tenant {name} is no admin; expected the token of one for {method}")

    def max_accuracy_loss(self, name: str) -> float | None:
        """The floor of a tenant's requests that state none; None: its entry has none either."""
        tenant = self._tenants.get(name)
        return None if tenant is None else tenant.max_accuracy_loss

    def check(self, name: str) -> None:
        """Raises Overloaded, with the time to wait, if a request would be refused now; takes nothing."""
        self._of(name).check_call(self._clock())

    @contextlib.contextmanager
    def enter(self, name: str, nbytes: int = 0) -> Iterator[Callable[[int], None]]:
        """One request of a tenant, which holds one of its slots inside the block and is who calls there.

        Args:
            name: of the tenant.
            nbytes: what the request has, as far as it is there.

        Yields:
            A function that counts bytes of the request that come later.

        Raises:
            Overloaded: a limit of the tenant is reached; with the time to wait.
            Unauthenticated: the tenant is gone.
        """
        usage, now = self._of(name), self._clock()
        usage.check_call(now)
        usage.take(1, nbytes, now)
        usage.under_way += 1
        try:
            with calling(name):
                yield lambda more: usage.take(0, more, self._clock())
        finally:
            usage.under_way -= 1

    def charge(self, name: str, nbytes: int, requests: int = 0) -> None:
        """Counts a message of a call that goes on.

        Args:
            name: of the tenant.
            nbytes: what the message has.
            requests: 1 if the message is a request of its own.

        Raises:
            Overloaded: a limit of the tenant is reached, and nothing was counted; with the time to wait.
            Unauthenticated: the tenant is gone.
        """
        usage, now = self._of(name), self._clock()
        usage.check(requests, now)
        usage.take(requests, nbytes, now)

    def refused(self, error: MoselError, peer: str, method: str, name: str = "") -> None:
        """Counts and logs what was refused; never what the caller sent as its token."""
        kind = f"quota.{name}"
        if isinstance(error, Unauthenticated):
            kind = "unauthenticated"
        elif isinstance(error, PermissionDenied):
            kind = "permission"
        self._counters[f"refused.{kind}"] += 1
        log.warning(
            "refused",
            extra={"reason": str(error), "peer": peer, "method": method[:_SHOWN_METHOD], "tenant": name or None},
        )

    def statistics(self) -> dict[str, int]:
        """Calls under way by tenant."""
        return {f"under_way.{name}": usage.under_way for name, usage in self._usage.items()}

    def _of(self, name: str) -> _Usage:
        if name not in self._tenants:
            raise Unauthenticated(f"tenant {name} is not known any more")
        if name not in self._usage:
            self._usage[name] = _Usage(name, self._tenants[name], self._clock())
        return self._usage[name]
