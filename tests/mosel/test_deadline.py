"""Deadlines."""

import math
import time

import pytest

from mosel.deadline import Deadline
from mosel.errors import DeadlineExceeded


def test_remaining_falls_and_counts_from_now() -> None:
    deadline = Deadline.after(3600)
    first, second = deadline.remaining, deadline.remaining
    assert 0 < second <= first <= 3600


def test_a_deadline_that_is_over_names_the_step_that_is_not_begun() -> None:
    with pytest.raises(DeadlineExceeded, match="the deadline passed before fusing"):
        Deadline(time.monotonic()).check("fusing")
    assert Deadline.after(-5).remaining <= -5


def test_a_deadline_ahead_lets_the_step_begin() -> None:
    Deadline.after(3600).check("fusing")
    Deadline(math.inf).check("fusing")
