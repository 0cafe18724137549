"""Who takes part, and with which work."""

from dataclasses import dataclass

from bench.null_model import NAME as NOTHING
from mosel.config import PLACEMENTS

DIGITS, DIGITS_FAST = "digits", "digits_fast"
TRITON, KSERVE = "triton", "kserve"
CEILING, CEILING_FAST, CEILING_NOTHING = "ceiling", "ceiling-fast", "ceiling-nothing"
# The modality sets of `digits` that floors mean to servers which know none.
SETS = {0.95: ("audio", "image"), 0.85: ("image", "pen")}


@dataclass(frozen=True)
class Work:
    """What is asked for in a window: jobs of so many items, so many in flight."""

    model: str
    items: int
    in_flight: int


@dataclass(frozen=True)
class Contestant:
    """One row of each work that it can do.

    Attributes:
        name: as the table has it.
        server: which one, see `servers`.
        model: as the server calls it.
        floor: the accuracy that is asked for, or None.
        sends: the modalities that are sent; empty: all.
        plan_first: the Python client is used, and sends what will be used.
    """

    name: str
    server: str
    model: str
    floor: float | None = None
    sends: tuple[str, ...] = ()
    plan_first: bool = False

    @property
    def work(self) -> str:
        """The model of the works that it takes part in."""
        return NOTHING if self.model == NOTHING else DIGITS


WORKS = (
    *(Work(NOTHING, items, in_flight) for items, in_flight in ((1, 1), (1, 8), (32, 4))),
    *(Work(DIGITS, items, in_flight) for items, in_flight in ((1, 1), (1, 16), (8, 8), (32, 6))),
)
CONTESTANTS = (
    Contestant("ceiling", CEILING_NOTHING, NOTHING),
    Contestant("Triton", TRITON, NOTHING),
    Contestant("KServe", KSERVE, NOTHING),
    *(Contestant(placement, f"{placement}-nothing", NOTHING) for placement in PLACEMENTS),
    Contestant("ceiling fast, all", CEILING_FAST, DIGITS),
    *(Contestant(f"ceiling fast, {floor}", CEILING_FAST, DIGITS, floor) for floor in SETS),
    Contestant("ceiling, all", CEILING, DIGITS),
    Contestant("Triton, all", TRITON, DIGITS),
    Contestant("Triton fast, all", TRITON, DIGITS_FAST),
    Contestant("Triton fast, image+pen alone", TRITON, DIGITS_FAST, sends=SETS[0.85]),
    *(
        Contestant(f"{placement}, {floor or 'all'}", placement, DIGITS, floor)
        for placement in PLACEMENTS
        for floor in (None, *SETS)
    ),
    *(Contestant(f"{placement}, 0.85, plan first", placement, DIGITS, 0.85, (), True) for placement in PLACEMENTS),
)
