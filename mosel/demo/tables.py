"""The demo's results as tables for a terminal."""

import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from mosel.client.assurance import rounded_down, rounded_up
from mosel.profiles.labelled_run import Row

_NOTHING, _MARK = "-", "*"


def floors_table(rows: Sequence[Row], everything: float) -> Table:
    """What each floor led to; `everything` is the accuracy of everything on the same items."""
    table = _table("expected", "measured", "p50\nms", "p99\nms", "saved")
    for row in rows:
        numbers = (
            _number(row.expected, f"{row.expected:.3f}"),
            _measured(row, everything),
            *map(_ms, (row.p50_ms, row.p99_ms)),
        )
        table.add_row(*_what(row), *numbers, share(row.assurance.saved if row.items else math.nan))
    return table


def deadline_table(rows: Sequence[Row], everything: float) -> Table:
    """What a tight deadline led to at each floor; `everything` as of `floors_table`."""
    table = _table("measured", "p99\nms", "in\ntime", "refused", "missed")
    for row in rows:
        jobs = map(str, (row.in_time, row.refused, row.missed))
        table.add_row(*_what(row), _measured(row, everything), _ms(row.p99_ms), *jobs)
    return table


def remarks(rows: Sequence[Row], everything: float) -> Iterator[str]:
    """Lines below a table: the guarantees that were missed, and what the answers say of theirs."""
    for row in rows:
        if row.misses(everything):
            against = "" if row.assurance.guaranteed_loss is None else f", everything {everything:.3f}"
            yield (
                f"{_measured(row, everything)} MISSES what is guaranteed for '{floor(row)}', {guaranteed(row)}, "
                f"by more than 2 standard errors{against}"
            )
    yield from dict.fromkeys(row.assurance.note for row in rows if row.assurance.note)


def floor(row: Row) -> str:
    """A row's floor in words."""
    if row.setting.max_loss is not None:
        points = f"{100 * row.setting.max_loss:g}"
        return f"at most {points} {'point' if points == '1' else 'points'} worse"
    return "no floor" if row.setting.floor is None else f"at least {row.setting.floor:.3g}".ljust(13, "0")


def guaranteed(row: Row) -> str:
    """What all answers of a row guarantee."""
    said = row.assurance
    if said.guaranteed_accuracy is not None:
        bound = f"at least {rounded_down(said.guaranteed_accuracy)}"
    elif said.guaranteed_loss is not None:
        bound = f"at most {rounded_up(said.guaranteed_loss)} worse"
    else:
        return "expected only" if row.items else _NOTHING
    return f"not guaranteed; {bound}" if said.guarantee == "none" else bound


def modality_sets(row: Row) -> str:
    """The modality sets that a row used, with their shares of the items unless there is one only."""
    if len(row.shares) == 1:
        return next(iter(row.shares))
    return "\n".join(f"{name} {share(part)}" for name, part in row.shares.items()) or _NOTHING


def share(part: float) -> str:
    """A share 0..1 in percent; 100% is all of it, to the last item, and 0% nothing."""
    if 0 < part < 1:
        part = min(max(part, 0.01), 0.99)
    return _number(part, f"{part:.0%}")


def _what(row: Row) -> tuple[str, str, str]:
    return floor(row), modality_sets(row), guaranteed(row)


def _measured(row: Row, everything: float) -> str:
    mark = _MARK if row.misses(everything) else ""
    return _number(row.accuracy, f"{row.accuracy:.3f} ± {row.standard_error:.3f}{mark}")


def _ms(value: float) -> str:
    return _number(value, f"{value:.1f}")


def _number(value: float, text: str) -> str:
    return _NOTHING if math.isnan(value) else text


def _table(*numbers: str) -> Table:
    """Fits into 100 columns of text; in fewer, the texts are folded."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column in ("floor", "inputs run", "guaranteed"):
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table
