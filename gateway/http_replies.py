"""What every HTTP port of the gateway answers with: JSON, and errors as JSON."""

import asyncio
import functools
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, cast

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mosel.errors import MoselError
from mosel.runtime.incoming import note_incoming
from mosel.status import http_headers_of, http_status_of, message_of, one_line

P = ParamSpec("P")

log = logging.getLogger(__name__)


class JsonReply(Response):
    """JSON in ASCII, whatever a caller had put into it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_reply(error: MoselError) -> JsonReply:
    """An error with its status, and when to try again."""
    return JsonReply({"error": message_of(error)}, http_status_of(error), http_headers_of(error))


def answers_with_error(
    endpoint: Callable[P, Awaitable[Response]],
) -> Callable[P, Awaitable[Response]]:
    """Decorates an endpoint: a MoselError becomes its status, anything else 500 and a log entry."""

    @functools.wraps(endpoint)
    async def guarded(*args: P.args, **kwargs: P.kwargs) -> Response:
        request = cast(Request, args[-1])
        note_incoming(f"{request.method} {request.url.path}", request.headers.items)
        try:
            return await endpoint(*args, **kwargs)
        except MoselError as error:
            return error_reply(error)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("unexpected error", extra={"endpoint": endpoint.__name__})
            return JsonReply({"error": f"internal error in {endpoint.__name__}; the log has more"}, 500)

    return guarded


async def not_routed(request: Request, error: Exception) -> Response:
    """The answer where there is no endpoint for a path, or none for its method."""
    assert isinstance(error, HTTPException)
    path, method, headers = request.url.path, request.method, dict(error.headers or {})
    if error.status_code == 405:
        message = f"method of {path} is {method}; expected {headers.get('Allow', 'another')}"
    else:
        message = f"path is {path}; expected one of those that /openapi.json lists"
    return JsonReply({"error": one_line(message)}, error.status_code, headers)
