"""The guard in front of HTTP: ASGI middleware around any application."""

import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from gateway.access.caller import calling
from gateway.access.guard import Guard
from mosel.errors import MoselError, Unauthenticated
from mosel.status import http_headers_of, http_status_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# Whoever restarts or routes to a gateway must be able to ask how it is.
_OPEN = ("/v2/health/live", "/v2/health/ready")
_REPOSITORY, _INDEX = "/v2/repository", "/v2/repository/index"


def needs_admin(path: str) -> bool:
    """Whether only admins may ask for a path: all of the repository but its index loads and unloads models."""
    return path.startswith(_REPOSITORY) and path != _INDEX


class OnlyTenantsHttp:
    """Lets in requests whose header `authorization` has a tenant's token, within the tenant's limits.

    Args:
        app: what is behind it.
        guard: knows the tenants.
    """

    def __init__(self, app: App, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] == "lifespan" or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        tenant = ""
        with contextlib.ExitStack() as entered:
            try:
                tenant = self._guard.identify(_authorizations(scope))
                if needs_admin(scope["path"]):
                    self._guard.check_admin(tenant, scope["path"])
                count = entered.enter_context(self._guard.enter(tenant))
                entered.enter_context(calling(tenant))
            except MoselError as error:
                self._guard.refused(error, _peer(scope), f"{scope['method']} {scope['path']}", tenant)
                await _refuse(error, send)
                return

            async def counted() -> Message:
                message = await receive()
                count(len(message.get("body", b"")))
                return message

            await self._app(scope, counted, send)


def _authorizations(scope: Message) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]


def _peer(scope: Message) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else ""


async def _refuse(error: MoselError, send: Send) -> None:
    """The answer in the form of the Open Inference Protocol."""
    body = json.dumps({"error": str(error)}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | http_headers_of(error)
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": http_status_of(error), "headers": encoded})
    await send({"type": "http.response.body", "body": body})
