"""Which consumer reaches which producer's tensors, and how. Opening an arena is left to the caller."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from mosel.v1 import arena_pb2, selector_pb2, service_pb2, tensor_pb2

Rung: TypeAlias = tensor_pb2.Rung.ValueType
# Has a consumer open an arena; raises ServiceUnavailable if it does not answer.
Opener = Callable[[str, arena_pb2.ArenaDescription], Awaitable[arena_pb2.PreflightReport]]
# Where a consumer can fetch from a producer, or why it cannot; neither for a consumer on the same machine.
FetchFrom = Callable[[str, str], Awaitable[selector_pb2.FetchAddress]]


@dataclass(frozen=True)
class Edge:
    """How tensors get from a producer to a consumer, and why not better."""

    rung: Rung
    reason: str = ""


class Attachments:
    """All edges of one selector. An edge is used only after its path was proven.

    Args:
        opener: has a consumer open an arena.
        fetch_from: says where a consumer that cannot map a producer's arenas fetches from.
    """

    def __init__(self, opener: Opener, fetch_from: FetchFrom) -> None:
        self._opener, self._fetch_from = opener, fetch_from
        self._announced: dict[str, list[arena_pb2.AnnouncedArena]] = {}
        self._edges: dict[tuple[str, str], Edge] = {}

    def announce(self, producer: str, announcement: arena_pb2.Announcement) -> None:
        """A producer came, or came again; its old edges are void."""
        self.forget(producer)
        self._announced[producer] = list(announcement.arenas)

    async def attach(self, producer: str, consumer: str) -> Edge:
        """Has the consumer open the producer's arenas and keeps the best path that works.

        Raises:
            ServiceUnavailable: the consumer does not answer.
        """
        announced = self._announced.get(producer, [])
        failed: list[tuple[Rung, str]] = []
        rung: Rung = tensor_pb2.INLINE
        for path in announced:
            if reason := await self._why_not(consumer, path):
                failed.append((path.arena.rung, reason))
            else:
                rung = max(rung, path.arena.rung)
        # What is worse than the path that is taken needs no excuse.
        reasons = [reason for tried, reason in failed if tried > rung]
        if rung == tensor_pb2.INLINE:
            rung, reason = await self._by_fetching(producer, consumer, announced)
            reasons.append(reason)
        edge = Edge(rung, "; ".join(filter(None, reasons)))
        # Meanwhile the producer may have gone, or have come again.
        if self._announced.get(producer) is announced:
            self._edges[producer, consumer] = edge
        return edge

    def rung(self, producer: str, consumer: str) -> Rung:
        """How the consumer reaches the producer's tensors; INLINE while that is not proven."""
        return self._edges.get((producer, consumer), Edge(tensor_pb2.INLINE)).rung

    def is_attached(self, producer: str, consumer: str) -> bool:
        """Whether it is known how the consumer reaches the producer's tensors."""
        return (producer, consumer) in self._edges

    def worst(self, producer: str, consumers: Iterable[str]) -> Edge:
        """The edge that decides when one tensor must reach every consumer."""
        edges = [self._edges.get((producer, consumer), Edge(tensor_pb2.INLINE)) for consumer in consumers]
        return min(edges, key=lambda edge: edge.rung, default=Edge(tensor_pb2.INLINE, "no consumer is there"))

    def forget(self, name: str) -> list[tuple[str, arena_pb2.ArenaDescription]]:
        """A service is gone, as producer and as consumer; returns who has which of its arenas open."""
        arenas = [announced.arena for announced in self._announced.pop(name, [])]
        consumers = [consumer for producer, consumer in self._edges if producer == name]
        self._edges = {pair: edge for pair, edge in self._edges.items() if name not in pair}
        return [(consumer, arena) for consumer in consumers for arena in arenas]

    async def _why_not(self, consumer: str, path: arena_pb2.AnnouncedArena) -> str:
        """Has a consumer open an arena; returns why the path cannot be used, empty if it was proven."""
        report = await self._opener(consumer, path.arena)
        if report.nonce and report.nonce == path.nonce:
            return ""
        name = tensor_pb2.Rung.Name(path.arena.rung).lower()
        return f"{name}: {report.reason or 'the nonce read there is not the one of the producer'}"

    async def _by_fetching(
        self, producer: str, consumer: str, announced: Iterable[arena_pb2.AnnouncedArena]
    ) -> tuple[Rung, str]:
        """Has a consumer that can map nothing fetch; returns how it goes on, and why not better if that is new."""
        path = next((path for path in announced if path.arena.rung == tensor_pb2.POSIX_SHM), None)
        if path is None:
            return tensor_pb2.INLINE, ""
        where = await self._fetch_from(producer, consumer)
        if not where.address:
            return tensor_pb2.INLINE, f"fetch: {where.reason}" if where.reason else ""
        fetched = arena_pb2.AnnouncedArena(arena=path.arena, nonce=path.nonce)
        fetched.arena.rung, fetched.arena.address = tensor_pb2.FETCH, where.address
        reason = await self._why_not(consumer, fetched)
        return (tensor_pb2.INLINE if reason else tensor_pb2.FETCH), reason

    def statuses(self) -> list[service_pb2.EdgeStatus]:
        """Every edge, for `mosel status`."""
        return [
            service_pb2.EdgeStatus(producer=producer, consumer=consumer, rung=edge.rung, reason=edge.reason)
            for (producer, consumer), edge in sorted(self._edges.items())
        ]

    def statistics(self) -> dict[str, int]:
        """Edges by rung."""
        counts: dict[str, int] = {}
        for edge in self._edges.values():
            name = f"edges.{tensor_pb2.Rung.Name(edge.rung).lower()}"
            counts[name] = counts.get(name, 0) + 1
        return counts
