"""The model packages that requests are checked against: they follow what the selector has loaded. Knows no gRPC."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

from gateway.selector_link import SelectorLink
from mosel.errors import MoselError
from mosel.packages.model_package import ModelPackage, find_package

log = logging.getLogger(__name__)


class ServedPackages:
    """Takes over each package that the selector loads, and tells it which ones jobs may still name.

    Args:
        models_dir: the folder of model packages.
        packages: what is known from the start, by name.
        link: the stream to the selector.

    Attributes:
        packages: by name; always the same mapping. That of a model that was unloaded stays, and so does what is said
            of its inputs; the selector refuses its jobs.
    """

    def __init__(self, models_dir: Path, packages: Mapping[str, ModelPackage], link: SelectorLink) -> None:
        self.packages = dict(packages)
        self._models_dir, self._link = models_dir, link
        self._checking: set[object] = set()
        # Packages that were replaced, and the requests that began before: they may have been checked against them.
        self._leaving: dict[str, set[object]] = {}
        # What this selector has said that it loaded; it stays loaded for as long as jobs may name it.
        self._loaded: set[str] = set()
        self._one_at_a_time = asyncio.Lock()

    def begin_checking(self, request: object) -> None:
        """A request is checked from now on: the packages that it finds stay loaded until `checked` is called."""
        self._checking.add(request)

    def checked(self, request: object) -> None:
        """It was sent as a job, or given up; says so to the selector, once, if that is what it waits for."""
        self._checking.discard(request)
        for model, requests in list(self._leaving.items()) if self._leaving else ():
            requests.discard(request)
            if not requests:
                del self._leaving[model]
                self._tell()

    def is_loaded(self, name: str) -> bool:
        """Whether the selector takes jobs that were checked against a model's package."""
        state, package = self._link.models.get(name), self.packages.get(name)
        if state is None or package is None:
            return False
        return package.revision == state.revision or package.id in self._loaded

    async def follow(self) -> None:
        """Takes over what the selector has loaded, as far as it can be read here, and says so to the selector."""
        said = {f"{name}@{state.revision}" for name, state in self._link.models.items()}
        known = {package.id for package in self.packages.values()}
        self._loaded = said | (self._loaded & known if self._link.connected else set())
        for name in list(self._link.models):
            try:
                await self.take_over(name)
            except MoselError as error:
                log.warning("not the selector's package", extra={"model": name, "reason": str(error)})
        self._tell()

    async def take_over(self, name: str) -> None:
        """Takes over the package that the selector has loaded under a name; none if it has none.

        Raises:
            ModelNotFound, PackageError: it is not in the models folder here.
        """
        async with self._one_at_a_time:
            state, known = self._link.models.get(name), self.packages.get(name)
            if state is None or (known is not None and known.revision == state.revision):
                return
            model = f"{name}@{state.revision}"
            self.packages[name] = await asyncio.to_thread(find_package, self._models_dir, model)
            if known is not None and self._checking:
                self._leaving[known.id] = set(self._checking)
            log.info("model", extra={"model": model})

    def _tell(self) -> None:
        self._link.name_models({package.id for package in self.packages.values()} | self._leaving.keys())
