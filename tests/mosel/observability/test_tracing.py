"""Tracing off, and tracing without what it needs."""

import re
import subprocess
import sys
import time

import pytest

from mosel.config import load_settings
from mosel.errors import ConfigError
from mosel.observability.tracing import OFF
from mosel.runtime.tracing import open_tracing

PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_off_by_default_and_then_a_trace_is_handed_on_as_it_is() -> None:
    with open_tracing(load_settings(), "selector") as tracing:
        assert tracing is OFF
        assert not tracing.on
        span = tracing.begin("fuse", PARENT, "client")
        assert span.traceparent == PARENT
        span.end({"items": 3}, ValueError("no"), time.monotonic())
        assert tracing.begin("request", trace_id=bytes(16)).traceparent == ""


def test_off_nothing_of_opentelemetry_is_loaded() -> None:
    code = """
import sys
from mosel.config import load_settings
from mosel.runtime.tracing import open_tracing
import gateway.__main__, selector.__main__, encoders.__main__, fusion.__main__
with open_tracing(load_settings(), "gateway") as tracing:
    tracing.begin("request").end()
print(*[name for name in sys.modules if name.startswith("opentelemetry")])
"""
    assert run(code).stdout.strip() == ""


def test_on_without_the_packages_the_message_says_what_to_install() -> None:
    code = """
import sys
sys.modules["opentelemetry"] = None
from mosel.config import load_settings
from mosel.errors import ConfigError
from mosel.runtime.tracing import open_tracing
settings = load_settings(tracing={"otlp_endpoint": "http://127.0.0.1:4317"})
try:
    with open_tracing(settings, "gateway"):
        pass
except ConfigError as error:
    print(error)
"""
    message = (
        r"tracing\.otlp_endpoint is set, but opentelemetry\S* is not installed: pip install 'mosel-server\[tracing\]'\n"
    )
    assert re.fullmatch(message, run(code).stdout)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"otlp_endpoint": "localhost:4317"}, "tracing.otlp_endpoint"),
        ({"otlp_endpoint": "http://"}, "tracing.otlp_endpoint"),
        ({"sample_ratio": 1.5}, "tracing.sample_ratio"),
        ({"sample_ratio": -0.1}, "tracing.sample_ratio"),
    ],
)
def test_settings_that_are_none(section: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"setting '{key}' holds"):
        load_settings(tracing=section)
