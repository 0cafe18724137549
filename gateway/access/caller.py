"""The tenant on whose behalf the current task works. None: nobody has to say who it is, so that everything is open."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_CALLER: ContextVar[str | None] = ContextVar("caller", default=None)


def caller() -> str | None:
    """The tenant's name."""
    return _CALLER.get()


@contextlib.contextmanager
def calling(tenant: str) -> Iterator[None]:
    """The current task works for a tenant inside the block, and so do the tasks that it starts there."""
    before = _CALLER.set(tenant)
    try:
        yield
    finally:
        _CALLER.reset(before)
