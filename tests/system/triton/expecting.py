"""What the scripts beside this expect of calls that must fail."""

from collections.abc import Callable

from tritonclient.utils import InferenceServerException


def refused(status: str, message: str, call: Callable[..., object], *arguments: object, **keywords: object) -> None:
    """Fails unless the call is refused with a status that has this in it, and one line that has this message in it."""
    try:
        call(*arguments, **keywords)
    except InferenceServerException as error:
        found = error
    else:
        raise AssertionError(f"{call.__name__} was not refused: {message}")
    assert status in (found.status() or ""), found
    assert message in found.message(), found
    assert "\n" not in found.message(), found
