"""Modules of packages, imported by path."""

import importlib.util
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest

from mosel.errors import PackageError
from mosel.packages.model_modules import forget_modules, import_module

SHARED = next(
    (
        Path(spec.origin)
        for name in ("_bisect", "_heapq", "_csv")
        if (spec := importlib.util.find_spec(name)) and spec.origin and Path(spec.origin).is_file()
    ),
    None,
)


@pytest.mark.skipif(SHARED is None, reason="the extensions of this Python are built in")
def test_a_native_extension_that_was_replaced_is_refused(tmp_path: Path) -> None:
    assert SHARED is not None
    module, file = SHARED.name.partition(".")[0], tmp_path / SHARED.name
    shutil.copy(SHARED, file)
    import_module("native", tmp_path, module)
    forget_modules("native")
    import_module("native", tmp_path, module)
    forget_modules("native")
    # What follows the end of an ELF file is nothing to the linker.
    other = tmp_path / "other"
    other.write_bytes(SHARED.read_bytes() + b"other")
    os.replace(other, file)  # noqa: PTH105
    with pytest.raises(PackageError, match=r"was replaced, and this process has loaded what it was before"):
        import_module("native", tmp_path, module)


def test_other_threads_may_import_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "simple.py").write_text("")
    over, before = threading.Event(), sys.getswitchinterval()

    def import_others() -> None:
        names = [f"other_{n}" for n in range(500)]
        while not over.is_set():
            sys.modules.update(dict.fromkeys(names, sys.modules[__name__]))
            for name in names:
                del sys.modules[name]

    others = threading.Thread(target=import_others)
    sys.setswitchinterval(1e-6)
    others.start()
    try:
        for _ in range(300):
            import_module("meanwhile", tmp_path, "simple")
            forget_modules("meanwhile")
    finally:
        over.set()
        others.join()
        sys.setswitchinterval(before)
