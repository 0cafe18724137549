"""Networks that stay are nothing that the garbage collector looks at; those that went leave nothing behind."""

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from mosel.runtime import heap


class Cyclic:
    """Something that only the collector frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_there_is_passed_over_and_what_nobody_uses_is_freed_the_next_time() -> None:
    kept, gone = Cyclic(), weakref.ref(Cyclic())
    heap.settle()
    assert gone() is None
    assert not any(one is kept for one in gc.get_objects())
    seen = weakref.ref(kept)
    del kept
    gc.collect()
    assert seen() is not None
    heap.settle()
    assert seen() is None


def test_networks_that_come_together_are_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settled, calls = threading.Event(), list[int]()

    def note() -> None:
        calls.append(1)
        settled.set()

    monkeypatch.setattr(heap, "settle", note)
    monkeypatch.setattr(heap, "_QUIET_S", 0.2)
    for _ in range(5):
        heap.settle_soon()
    assert settled.wait(30)
    assert calls == [1]
