"""What callers give, checked before it is sent: a wrong kind or value is an InvalidRequest that says what is right."""

import math
import reprlib
from collections.abc import Callable, Iterable
from numbers import Integral, Real

import numpy as np

from mosel.errors import InvalidRequest

# gRPC takes what is beyond some hundred years for something that was long ago.
_LONGEST_S = 1e9


def wrong_kind(field: str, value: object, expected: str) -> InvalidRequest:
    """The error for a value that is not of the right kind."""
    return InvalidRequest(f"{field} is {shown(value)}; expected {expected}")


def shown(value: object) -> str:
    """A value for messages, with its type or shape, in one short line."""
    kind, shape = type(value).__name__, getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{kind} of shape {list(shape)}"
    return f"{' '.join(reprlib.repr(value).split())} ({kind})"


def number(field: str, value: object, expected: str, accepts: Callable[[float], bool]) -> float:
    """A number, of Python or of numpy; raises InvalidRequest for anything else, and for one that is not accepted."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong_kind(field, value, expected)
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not accepts(found):
        raise InvalidRequest(f"{field} is {value if math.isfinite(found) else found}; expected {expected}")
    return found


def seconds(field: str, value: object) -> float:
    """A time limit; raises InvalidRequest for anything else."""
    expected = f"a positive number of seconds, at most {_LONGEST_S:g}"
    return number(field, value, expected, lambda found: 0 < found <= _LONGEST_S)


def whole(field: str, value: object, expected: str, accepts: Callable[[int], bool]) -> int:
    """A whole number, of Python or of numpy; raises InvalidRequest for anything else, and if it is not accepted."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong_kind(field, value, expected)
    if not accepts(int(value)):
        raise InvalidRequest(f"{field} is {value}; expected {expected}")
    return int(value)


def flag(field: str, value: object) -> bool:
    """True or False; raises InvalidRequest for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise wrong_kind(field, value, "True or False")
    return bool(value)


def text(field: str, value: object, expected: str) -> str:
    """A string; raises InvalidRequest for anything else."""
    if not isinstance(value, str):
        raise wrong_kind(field, value, expected)
    return str(value)


def names(field: str, value: object) -> list[str]:
    """Several strings; raises InvalidRequest for anything else, a single one included."""
    expected = "several names, such as ['image', 'pen']"
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise wrong_kind(field, value, expected)
    try:
        found = list(value)
    except TypeError:
        # numpy's arrays without a dimension say only then that there is nothing to iterate over.
        raise wrong_kind(field, value, expected) from None
    for name in found:
        if not isinstance(name, str):
            raise InvalidRequest(f"{field} has {shown(name)}; expected {expected}")
    return list(map(str, found))
