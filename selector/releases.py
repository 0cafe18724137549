"""Tells producers which of their slots nobody reads any more."""

import asyncio
from collections import defaultdict

from mosel.v1 import tensor_pb2
from selector.core.ledger import Ledger
from selector.gateway_session import GatewaySession
from selector.in_flight import SlotKey
from selector.services.compute_services import ComputeServices

# They wait this long for company.
_EVERY_S = 0.005


class Releases:
    """What the ledger has released and producers do not know yet.

    Args:
        ledger: releases slots.
        services: those that compute.
    """

    def __init__(self, ledger: Ledger[SlotKey], services: ComputeServices) -> None:
        self._ledger, self._services = ledger, services
        self._timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Has them sent, if there are any by then."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_EVERY_S, self._send)

    def _send(self) -> None:
        self._timer = None
        by_producer: dict[GatewaySession | str, list[tensor_pb2.ArenaSlot]] = defaultdict(list)
        for producer, arena_id, epoch, slot, generation in self._ledger.take_released():
            by_producer[producer].append(
                tensor_pb2.ArenaSlot(arena_id=arena_id, epoch=epoch, slot=slot, generation=generation)
            )
        for producer, slots in by_producer.items():
            if isinstance(producer, GatewaySession):
                producer.release(slots)
            else:
                self._services.release(producer, slots)
