"""The standard error of items in groups."""

import math

import numpy as np
import pytest

from bench.accuracy import standard_error


def test_items_are_alike_in_every_grouping() -> None:
    """Two crossed groupings, each of which decides a part of what is right: either alone tells half of the error."""
    random = np.random.default_rng(0)
    first, second = np.divmod(np.arange(900), 30)
    values = random.normal(size=30)[first] + random.normal(size=30)[second]
    crossed = standard_error([((int(a), int(b)), float(v)) for a, b, v in zip(first, second, values, strict=True)])
    by_first = standard_error([((int(a),), float(v)) for a, v in zip(first, values, strict=True)])
    alone = standard_error([((), float(v)) for v in values])
    assert alone < by_first < crossed
    assert crossed == pytest.approx(math.sqrt(2 / 30), rel=0.25)


def test_what_is_always_right_has_no_error() -> None:
    assert standard_error([((1,), True)] * 10) == 0
    assert math.isnan(standard_error([]))
