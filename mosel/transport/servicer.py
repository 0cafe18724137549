"""The producer's side of fetching: serves bytes of its arena to consumers that cannot map it."""

from mosel.errors import ReadNotProven
from mosel.runtime.service import Context, answers_with_status
from mosel.transport.shared_memory import SharedMemoryArena
from mosel.v1 import arena_pb2, arena_pb2_grpc

# For health.
PRODUCER = "mosel.v1.Producer"


class ProducerServicer(arena_pb2_grpc.ProducerServicer):
    """Serves `mosel.v1.Producer`.

    Args:
        arena: this process's.
    """

    def __init__(self, arena: SharedMemoryArena) -> None:
        self._arena, self._nonce = arena, arena.announcement().nonce

    @answers_with_status
    async def Fetch(  # type: ignore[override] # a coroutine that writes: each piece waits until there is room for it
        self, request: arena_pb2.FetchRequest, context: Context
    ) -> None:
        arena = self._arena
        if (request.arena_id, request.epoch) != (arena.arena_id, arena.epoch):
            raise ReadNotProven("the arena is not there")
        if not request.ranges:
            await context.write(arena_pb2.FetchReply(data=self._nonce))
        for wanted in request.ranges:
            for piece in arena.pieces(wanted):
                await context.write(arena_pb2.FetchReply(data=piece))
