"""Which addresses are served inside this process, and by whom at present."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Protocol

from mosel.errors import ConfigError
from mosel.runtime.in_process.rpc import Rpc
from mosel.runtime.in_process.unchanged import Unchanged
from mosel.runtime.in_process.waiters import Waiters


class TakesCalls(Protocol):
    """A server."""

    def begin(self, rpc: Rpc) -> None:
        """Takes a call."""


class LocalServices:
    """The services of one process.

    Args:
        unchanged: is told of each message between them, if somebody asks for it.

    Attributes:
        unchanged: as given.
    """

    def __init__(self, unchanged: Unchanged | None = None) -> None:
        self.unchanged = unchanged
        self._expected: set[str] = set()
        self._servers: dict[str, TakesCalls] = {}
        self._came = Waiters()

    @contextlib.contextmanager
    def expect(self, addresses: Iterable[str]) -> Iterator[None]:
        """Inside, these addresses are served, now or later, in this process and nowhere else."""
        added = set(addresses) - self._expected
        self._expected |= added
        try:
            yield
        finally:
            self._expected -= added

    def expects(self, address: str) -> bool:
        """Whether an address is served inside this process."""
        return address in self._expected

    def at(self, address: str) -> TakesCalls | None:
        """Who serves an address now."""
        return self._servers.get(address)

    async def arrival(self, address: str) -> TakesCalls:
        """Waits until an address is served."""
        while address not in self._servers:
            await self._came.wait()
        return self._servers[address]

    def add(self, address: str, server: TakesCalls) -> None:
        """An address is served from now on.

        Raises:
            ConfigError: another serves it.
        """
        if address in self._servers:
            raise ConfigError(f"{address} is taken by another service of this process")
        self._servers[address] = server
        self._came.wake()

    def remove(self, address: str, server: TakesCalls) -> None:
        """A server serves an address no more, if it did."""
        if self._servers.get(address) is server:
            del self._servers[address]

    def check_messages(self) -> None:
        """Looks whether somebody changed a message after it was handed over, if that is asked for.

        Raises:
            MessageChanged: somebody did.
        """
        if self.unchanged is not None:
            self.unchanged.check()


# Of this process.
local_services = LocalServices(Unchanged() if os.environ.get("MOSEL_CHECK_MESSAGES") else None)
