"""How long to wait before something that ended is started again."""

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0
# What was of use for so long ran well, and its next end is a new trouble.
RAN_WELL_S = 1.0


class Backoff:
    """The pauses of one service: almost none at first, then twice the last one, until it has run well for a while."""

    def __init__(self) -> None:
        self._next_s = FIRST_PAUSE_S

    def pause_s(self, ran_s: float) -> float:
        """Seconds to wait now that it has ended, after it was of use for so many."""
        if ran_s >= RAN_WELL_S:
            self._next_s = FIRST_PAUSE_S
        pause_s = self._next_s
        self._next_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return pause_s
