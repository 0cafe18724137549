"""What stays in memory for long, such as networks and the modules they are made of, costs the collector nothing.

A full collection looks at every object of the process and stops all its threads meanwhile: some 200 ms where torch is
loaded, after every thousand jobs or so.
"""

import gc
import threading

# Networks are loaded several at a time.
_QUIET_S = 1.0

_lock = threading.Lock()
_timer: threading.Timer | None = None


def settle_soon() -> None:
    """Collects once when networks have come or gone and no more do; what is left is passed over until the next time."""
    global _timer  # noqa: PLW0603 (a process has one collector)
    with _lock:
        if _timer is not None:
            _timer.cancel()
        _timer = threading.Timer(_QUIET_S, settle)
        _timer.daemon = True
        _timer.start()


def settle() -> None:
    """The same now."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
