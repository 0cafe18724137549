"""How much work keeps arriving, even if every job were run as cheaply as its floor allows."""

import math
from collections.abc import Mapping

_MEMORY_S = 2.0
# However much arrives, jobs that are here already get this share.
_MOST = 0.8
_NOTHING = 1e-6


class Arriving:
    """The share of each resource that arriving jobs need at least, over about the last two seconds."""

    def __init__(self) -> None:
        self._shares: dict[str, float] = {}
        self._at = 0.0

    def add(self, seconds: Mapping[str, float], now: float) -> None:
        """A job came, whose cheapest strategy keeps each resource busy for so many seconds."""
        self._fade(now)
        for resource, busy in seconds.items():
            self._shares[resource] = self._shares.get(resource, 0.0) + busy / _MEMORY_S

    def shares(self, now: float) -> dict[str, float]:
        """The share 0..1 of each resource."""
        self._fade(now)
        return {resource: min(share, _MOST) for resource, share in self._shares.items()}

    def _fade(self, now: float) -> None:
        fading = math.exp(-max(now - self._at, 0.0) / _MEMORY_S)
        faded = {resource: share * fading for resource, share in self._shares.items()}
        # Resources come and go with the machines that services run on.
        self._shares = {resource: share for resource, share in faded.items() if share > _NOTHING}
        self._at = max(now, self._at)
