"""Which consumer reaches which producer's tensors, and how. Opening an arena is left to whoever uses this."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from mosel.v1 import arena_pb2, service_pb2, tensor_pb2

Rung: TypeAlias = tensor_pb2.Rung.ValueType
# Has a consumer open an arena; a consumer that does not answer is a report with a reason.
Opener = Callable[[str, arena_pb2.ArenaDescription], Awaitable[arena_pb2.PreflightReport]]


@dataclass(frozen=True)
class Edge:
    """How tensors get from a producer to a consumer, and why not better."""

    rung: Rung
    reason: str = ""


class Attachments:
    """All edges of one selector. An edge is used only after its path was proven.

    Args:
        opener: has a consumer open an arena.
    """

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._announced: dict[str, list[arena_pb2.AnnouncedArena]] = {}
        self._edges: dict[tuple[str, str], Edge] = {}

    def announce(self, producer: str, announcement: arena_pb2.Announcement) -> None:
        """A producer came, or came again; its old edges are void."""
        self.forget(producer)
        self._announced[producer] = list(announcement.arenas)

    async def attach(self, producer: str, consumer: str) -> Edge:
        """Has the consumer open the producer's arenas and keeps the best path that works."""
        reasons, rung = [], tensor_pb2.INLINE
        for announced in self._announced.get(producer, []):
            report = await self._opener(consumer, announced.arena)
            if report.nonce and report.nonce == announced.nonce:
                rung = max(rung, announced.arena.rung)
            else:
                name = tensor_pb2.Rung.Name(announced.arena.rung).lower()
                reasons.append(f"{name}: {report.reason or 'the nonce read there is not the one of the producer'}")
        edge = Edge(rung, "; ".join(reasons))
        self._edges[producer, consumer] = edge
        return edge

    def rung(self, producer: str, consumer: str) -> Rung:
        """How the consumer reaches the producer's tensors; INLINE while that is not proven."""
        return self._edges.get((producer, consumer), Edge(tensor_pb2.INLINE)).rung

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
