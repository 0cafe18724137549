"""A gateway's HTTP port, in this process."""

from collections.abc import AsyncIterator

import pytest

from tests.gateway.inference.http_support import Http, speaking_http
from tests.gateway.scripted import Gateway


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[Http]:
    async with speaking_http(gateway) as http:
        yield http
