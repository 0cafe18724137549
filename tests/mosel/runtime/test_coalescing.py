"""What many ask for at about the same time is done once."""

import asyncio

from mosel.runtime.coalescing import Coalesced


async def rounds(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_it_is_done_once_for_all_who_ask_within_the_rounds() -> None:
    done = list[int]()
    work = Coalesced(lambda: done.append(len(done)), 3)
    work.ask()
    await rounds(2)
    work.ask()
    assert not done
    await rounds(3)
    assert done == [0]
    await rounds(10)
    assert done == [0]


async def test_who_asks_during_the_work_has_it_done_again() -> None:
    done = list[int]()

    def again() -> None:
        done.append(len(done))
        if len(done) == 1:
            work.ask()

    work = Coalesced(again, 1)
    work.ask()
    await rounds(10)
    assert done == [0, 1]


async def test_after_an_error_it_can_be_asked_for_again() -> None:
    told, done = list[object](), list[int]()

    def fails_first() -> None:
        done.append(len(done))
        if len(done) == 1:
            raise ValueError("first")

    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    work = Coalesced(fails_first, 1)
    work.ask()
    await rounds(5)
    work.ask()
    await rounds(5)
    assert done == [0, 1]
    assert [str(error) for error in told] == ["first"]
