"""Work that nobody waits for: it is ended with its owner, and what goes wrong in it is told."""

import asyncio
import logging

import pytest

from mosel.runtime.background import Background


async def test_closing_ends_what_is_under_way() -> None:
    background, ended = Background(), asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    background.start(wait())
    await asyncio.sleep(0)
    await background.close()
    assert ended.is_set()


async def test_what_goes_wrong_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise ValueError("broken")

    told: list[BaseException] = []
    with pytest.raises(ValueError, match="broken"):
        await Background(told.append).task(fail())
    Background().start(fail())
    await asyncio.sleep(0.01)
    assert [str(error) for error in told] == ["broken"]
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == ["unexpected error"]
