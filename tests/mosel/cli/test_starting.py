"""Ctrl-C ends a command that starts services, whatever Python does just then."""

import os
import signal
import weakref

import pytest

from mosel.cli.starting import Interrupts


class Anything:
    """Something that can be referred to weakly."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_is_raised_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.check()
        something = Anything()
        reference = weakref.ref(something, lambda _: os.kill(os.getpid(), signal.SIGINT))
        del something
        assert reference() is None
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_others_are_raised_at_once(number: signal.Signals) -> None:
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
