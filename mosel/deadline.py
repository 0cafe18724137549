"""The deadline as a value that is passed down and asked, never stored in a global."""

import time
from dataclasses import dataclass

from mosel.errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on this host's monotonic clock.

    Attributes:
        at: seconds, as `time.monotonic()` counts them.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """The deadline that lies `seconds` from now."""
        return cls(time.monotonic() + seconds)

    @property
    def remaining(self) -> float:
        """Seconds left; negative when it is over."""
        return self.at - time.monotonic()

    def check(self, step: str) -> None:
        """Raises DeadlineExceeded, naming the step that is not begun, if no time is left."""
        if self.remaining <= 0:
            raise DeadlineExceeded(f"the deadline passed before {step}")
