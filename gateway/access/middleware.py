"""The guard in front of HTTP: ASGI middleware around any application."""

import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access.guard import Guard
from gateway.http_replies import error_reply
from mosel.errors import MoselError

# Supervisors and load balancers must be able to ask how a gateway is.
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

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            except MoselError as error:
                self._guard.refused(error, _peer(scope), f"{scope['method']} {scope['path']}", tenant)
                await error_reply(error)(scope, receive, send)
                return

            async def counted() -> Message:
                message = await receive()
                count(len(message.get("body", b"")))
                return message

            await self._app(scope, counted, send)


def _authorizations(scope: Scope) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else ""
