"""The Python modules of model packages, imported by path."""

import os
import sys
from glob import glob
from importlib import import_module as import_by_name
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from mosel.errors import PackageError
from mosel.packages.content import file_sha256

_NAMESPACE = "mosel_models"
# Of the native extensions that this process has loaded, by path.
_native_digests: dict[str, str] = {}


def import_module(model: str, folder: Path, module: str) -> ModuleType:
    """A module of a folder as `mosel_models.<model>.<module>`, imported once; relative imports work inside it.

    Raises:
        PackageError: there is no such file, or it cannot be imported.
    """
    qualified = f"{_NAMESPACE}.{model}.{module}"
    _parent(_NAMESPACE, [])
    _parent(f"{_NAMESPACE}.{model}", [str(folder)])
    if not module.isidentifier() or find_spec(qualified) is None:
        raise PackageError(f"{folder / module}.py: no such file, but model.toml of '{model}' names it")
    try:
        return import_by_name(qualified)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PackageError(f"{folder / module}.py cannot be imported: {reason}") from error


def forget_modules(model: str) -> None:
    """Has the next import read a model's modules from disk again. Objects that use the old ones keep them."""
    # A copy: other threads import meanwhile.
    for name in [name for name in list(sys.modules) if f"{name}.".startswith(f"{_NAMESPACE}.{model}.")]:
        del sys.modules[name]


class _AlwaysCompiled(SourceFileLoader):
    """Never takes compiled code from a cache, which tells new source from old by whole seconds and its size only."""

    def path_stats(self, path: str) -> NoReturn:
        raise OSError(f"{path} is always compiled")


class _NeverReplaced(ExtensionFileLoader):
    """Refuses a file that was replaced: the dynamic linker goes on giving out what it loaded from that path first."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        digest = file_sha256(Path(self.path))
        if _native_digests.setdefault(self.path, digest) != digest:
            raise ImportError(
                f"{self.path} was replaced, and this process has loaded what it was before; start it again"
            )
        return super().create_module(spec)


def _parent(name: str, path: list[str]) -> None:
    """A package without __init__.py, which has the folder as its search path."""
    known = sys.modules.get(name)
    if known is not None and list(known.__path__) == path:
        return
    for stale in [key for key in list(sys.modules) if path and key.startswith(f"{name}.")]:
        del sys.modules[stale]
    parent = sys.modules[name] = ModuleType(name)
    parent.__path__ = path
    loaders = (_NeverReplaced, EXTENSION_SUFFIXES), (_AlwaysCompiled, SOURCE_SUFFIXES)
    for folder in path:
        # Those below are packages without __init__.py, too. Unlike that of Path, this follows links.
        for below in ("", *glob("**/", root_dir=folder, recursive=True)):  # noqa: PTH207
            searched = os.path.join(folder, below).rstrip("/")  # noqa: PTH118
            sys.path_importer_cache[searched] = FileFinder(searched, *loaders)
