"""What every test gets."""

from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster

PRODUCT = ["mosel", "gateway", "selector", "encoders", "fusion"]


@pytest.fixture(autouse=True)
def no_blocking_call_in_an_event_loop(request: pytest.FixtureRequest) -> Iterator[None]:
    """Makes a blocking call of the product inside an event loop an error; the tests' own calls may block."""
    if request.node.get_closest_marker("asyncio") is None:
        yield
        return
    detector = BlockBuster(PRODUCT)
    detector.activate()
    yield
    detector.deactivate()
