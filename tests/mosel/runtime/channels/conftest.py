"""Both kinds of channels, which must not differ."""

from collections.abc import AsyncIterator

import pytest

from tests.mosel.runtime.channels.ends import KINDS, Ends, open_ends


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def unserved(kind: str) -> AsyncIterator[Ends]:
    async with open_ends(kind) as ends:
        yield ends


@pytest.fixture
async def ends(unserved: Ends) -> AsyncIterator[Ends]:
    async with unserved.served():
        yield unserved
