"""Work that nobody waits for: it is ended with its owner, and what goes wrong in it is told."""

import asyncio
import logging
from typing import NoReturn

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


async def test_a_loop_that_fails_is_logged_and_begins_again(caplog: pytest.LogCaptureFixture) -> None:
    background, went_on, rounds = Background(pause_s=0), asyncio.Event(), 0

    async def loop() -> NoReturn:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            raise ValueError("broken")
        went_on.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    background.forever(loop, "example")
    async with asyncio.timeout(10):
        await went_on.wait()
    await background.close()
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[1] is not None
    assert (str(record.exc_info[1]), vars(record)["loop"]) == ("broken", "example")


async def test_a_loop_that_cannot_go_on_ends_the_process() -> None:
    given_up = asyncio.Event()
    background = Background(give_up=given_up.set, pause_s=0)

    async def loop() -> NoReturn:
        raise ValueError("broken")

    background.forever(loop, "example")
    async with asyncio.timeout(10):
        await given_up.wait()
    await background.close()
