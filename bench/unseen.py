"""Starts a service that times nothing, for comparison: `python -m bench.unseen gateway`."""

import runpy
import sys

from mosel.observability.metrics import Distribution


def _observe_nothing(self: Distribution, value: float, *labels: str) -> None:
    pass


if __name__ == "__main__":
    Distribution.observe = _observe_nothing  # type: ignore[method-assign]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
