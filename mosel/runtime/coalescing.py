"""Doing once what many ask for at about the same time."""

import asyncio
from collections.abc import Callable


class Coalesced:
    """Work that is done a moment after it was asked for, once for all who asked meanwhile.

    A moment is some rounds of the event loop: an idle process loses some microseconds, while in a busy one everything
    else that is ready makes as many steps, and may ask as well.

    Args:
        work: what is done; an error in it goes to the loop's handler, and it may be asked for again.
        rounds: at least one.
    """

    def __init__(self, work: Callable[[], None], rounds: int) -> None:
        self._work, self._rounds = work, rounds
        self._asked = False

    def ask(self) -> None:
        """Has it done."""
        if not self._asked:
            self._asked = True
            self._wait(self._rounds)

    def _wait(self, rounds: int) -> None:
        if rounds:
            asyncio.get_running_loop().call_soon(self._wait, rounds - 1)
        else:
            self._asked = False
            self._work()
