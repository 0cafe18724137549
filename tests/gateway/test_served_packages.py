"""The packages that requests are checked against, while a scripted selector loads others."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from gateway.selector_link import SelectorLink
from gateway.served_packages import ServedPackages
from mosel.config import Settings
from mosel.errors import ModelNotFound, PackageError, ServiceUnavailable
from mosel.packages.model_package import ModelPackage, load_package
from mosel.v1 import arena_pb2, selector_pb2
from tests.fruit_on_disk import Fruit
from tests.gateway.scripted import Gateway, ScriptedSelector, nowhere, serving


@pytest.fixture
def changing(models_dir: Path, tmp_path: Path) -> Fruit:
    return Fruit(shutil.copytree(models_dir / "fruit", tmp_path / "models" / "fruit"), tmp_path / "kept")


@dataclass
class Followed:
    """The packages of a gateway that follow what a selector says; each step is awaited."""

    served: ServedPackages
    link: SelectorLink
    selector: ScriptedSelector
    heard: asyncio.Event

    async def told(self, *packages: ModelPackage) -> None:
        """Lets the selector say what is loaded, and follows it."""
        states = [selector_pb2.ModelState(model=p.name, revision=p.revision, ready=True) for p in packages]
        self.heard.clear()
        self.selector.say(models=selector_pb2.ModelStates(models=states))
        async with asyncio.timeout(30):
            await self.heard.wait()
        await self.served.follow()

    async def named(self) -> list[str]:
        async with asyncio.timeout(30):
            return await self.selector.named.get()


@asynccontextmanager
async def following(settings: Settings, before: ModelPackage) -> AsyncIterator[Followed]:
    heard = asyncio.Event()
    announcement = arena_pb2.Announcement()
    async with (
        serving(settings) as selector,
        SelectorLink(settings, announcement, lambda slots: None, lambda rung: None, heard.set, nowhere) as link,
    ):
        followed = Followed(ServedPackages(settings.models_dir, {"fruit": before}, link), link, selector, heard)
        async with asyncio.timeout(30):
            await heard.wait()
        yield followed


@contextlib.contextmanager
def checking(followed: Followed) -> Iterator[Callable[[], None]]:
    """A request is checked inside, until it is sent: that is, until what is yielded is called."""
    request = object()
    followed.served.begin_checking(request)
    try:
        yield partial(followed.served.checked, request)
    finally:
        followed.served.checked(request)


@pytest.fixture
def settings(settings_with: Callable[..., Settings], changing: Fruit, tmp_path: Path) -> Settings:
    return settings_with(models_dir=changing.folder.parent, selector={"address": f"unix:{tmp_path}/s.sock"})


@pytest.fixture
def revisions(changing: Fruit) -> list[ModelPackage]:
    """What was on disk first, and what is now."""
    before = load_package(changing.folder)
    changing.change(1)
    return [before, load_package(changing.folder)]


async def test_a_package_is_taken_over_when_the_selector_has_loaded_it(
    settings: Settings, revisions: list[ModelPackage]
) -> None:
    before, after = revisions
    async with following(settings, before) as followed:
        packages = followed.served.packages
        assert packages == {"fruit": before}
        assert not followed.served.is_loaded("fruit")
        await followed.told(before)
        assert followed.served.is_loaded("fruit")
        assert await followed.named() == [before.id]
        await followed.told(after)
        assert packages == {"fruit": after}
        assert await followed.named() == [after.id]
        # What was unloaded is still described.
        await followed.told()
        assert packages == {"fruit": after}
        assert not followed.served.is_loaded("fruit")


async def test_what_a_request_may_have_found_is_named_until_it_is_sent(
    settings: Settings, revisions: list[ModelPackage]
) -> None:
    before, after = revisions
    async with following(settings, before) as followed:
        with checking(followed) as sent, checking(followed) as other_sent:
            await followed.told(after)
            both = sorted([before.id, after.id])
            assert await followed.named() == both
            with checking(followed):
                # It began later, and does not count.
                assert followed.served.packages["fruit"] == after
            sent()
            sent()
            await followed.served.follow()
            assert await followed.named() == both
            other_sent()
            assert await followed.named() == [after.id]
        assert followed.selector.named.empty()


async def test_a_request_that_is_given_up_lets_go_too(settings: Settings, revisions: list[ModelPackage]) -> None:
    before, after = revisions
    async with following(settings, before) as followed:
        with contextlib.suppress(ZeroDivisionError), checking(followed):
            await followed.told(after)
            assert await followed.named() == sorted([before.id, after.id])
            raise ZeroDivisionError
        assert await followed.named() == [after.id]


async def test_what_is_not_on_disk_here_is_not_taken_over(settings: Settings, revisions: list[ModelPackage]) -> None:
    before, after = revisions
    async with following(settings, after) as followed:
        # The disk has moved on.
        await followed.told(before)
        assert followed.served.packages == {"fruit": after}
        assert await followed.named() == [after.id]
        assert not followed.served.is_loaded("fruit")
        with pytest.raises(PackageError, match=rf"the files are {after.id}; expected {before.id}$"):
            await followed.served.take_over("fruit")


async def test_what_the_selector_had_loaded_counts_for_as_long_as_jobs_may_name_it(
    settings: Settings, revisions: list[ModelPackage]
) -> None:
    before, after = revisions
    async with following(settings, after) as followed:
        await followed.told(after)
        # Loaded next, but not on disk here.
        await followed.told(before)
        assert followed.served.packages == {"fruit": after}
        assert followed.served.is_loaded("fruit")


async def test_the_selector_s_refusals_are_passed_on(gateway: Gateway) -> None:
    with pytest.raises(PackageError, match=r"^fruit/model\.toml: as scripted$"):
        await gateway.client.load_model("fruit")
    with pytest.raises(ModelNotFound, match=r"^model 'fruit' is not loaded$"):
        await gateway.client.unload_model("fruit")


async def test_without_a_selector_nothing_is_loaded(settings: Settings) -> None:
    announcement = arena_pb2.Announcement()
    async with SelectorLink(
        settings, announcement, lambda slots: None, lambda rung: None, lambda: None, nowhere
    ) as link:
        for call in (link.load, link.unload):
            with pytest.raises(ServiceUnavailable, match=r"^service selector is not reachable$"):
                await call("fruit")
