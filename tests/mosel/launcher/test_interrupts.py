"""Ctrl-C just while a service is being started."""

import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from mosel.config import FREE_PORTS, Settings
from mosel.launcher import Launcher


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_service_that_is_being_started_just_then_is_stopped_as_the_others(
    settings_with: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    started = list[subprocess.Popen[bytes]]()
    popen = subprocess.Popen

    def interrupted(*arguments: Any, **keywords: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **keywords))
        os.kill(os.getpid(), number)
        return started[-1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    previous = signal.signal(number, interrupt)
    services = Launcher(settings_with(gateway=FREE_PORTS))
    try:
        with pytest.raises(KeyboardInterrupt), services:
            pass
    finally:
        signal.signal(number, previous)
    (only,) = started
    assert [child.process for child in services.children.values()] == [only]
    assert only.poll() is not None
    assert not services.settings.run_dir.exists()
