"""The demo's results as tables for a terminal."""

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from mosel.profiles.labelled_run import Row

_NOTHING = "-"


def floors_table(rows: Sequence[Row]) -> Table:
    """What each accuracy floor led to."""
    table = _table("payload\nread", "kB per\nitem", "saved")
    for row in rows:
        per_item = row.bytes_read / row.items / 1000 if row.items else math.nan
        table.add_row(*_what(row), size(row.bytes_read), _number(per_item, f"{per_item:.3g}"), share(row.saved))
    return table


def deadline_table(rows: Sequence[Row]) -> Table:
    """What a tight deadline led to at each floor."""
    table = _table("in\ntime", "refused", "missed")
    for row in rows:
        table.add_row(*_what(row), str(row.in_time), str(row.refused), str(row.missed))
    return table


def floor(row: Row) -> str:
    """A row's floor in words."""
    return "none" if row.setting.floor is None else f"{row.setting.floor:.3g}".ljust(4, "0")


def modality_sets(row: Row) -> str:
    """The modality sets that a row used, with their shares of the items unless there is one only."""
    if len(row.shares) == 1:
        return next(iter(row.shares))
    return "\n".join(f"{name} {share(part)}" for name, part in row.shares.items()) or _NOTHING


def size(count: float) -> str:
    """Bytes with a decimal unit, in 7 characters below a gigabyte."""
    if count < 1000:
        return f"{count:.0f} B"
    value, unit = (count / 1e3, "kB") if count < 1e6 else (count / 1e6, "MB")
    return f"{value:.{0 if value >= 100 else 1}f} {unit}"


def share(part: float) -> str:
    """A share 0..1 in percent; 100.0% is all of it, to the last byte."""
    return _number(part, f"{min(part, 0.999) if part < 1 else part:.1%}")


def _what(row: Row) -> tuple[str, ...]:
    accuracies = (_number(value, f"{value:.3f}") for value in (row.accuracy, row.expected))
    times = (_number(ms, f"{ms:.1f}") for ms in (row.p50_ms, row.p99_ms))
    return floor(row), modality_sets(row), *accuracies, *times


def _number(value: float, text: str) -> str:
    return _NOTHING if math.isnan(value) else text


def _table(*columns: str) -> Table:
    """Fits into 80 columns of text."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for column in ("floor", "modality sets", "accuracy", "expected", "p50\nms", "p99\nms", *columns):
        is_text = column == "modality sets"
        table.add_column(column, justify="left" if is_text else "right", no_wrap=not is_text)
    return table
