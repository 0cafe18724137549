"""Bodies of HTTP: of requests, bounded in bytes, in time, and in what all together may take; and of compressed ones."""

import asyncio
import contextlib
import gzip
import reprlib
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

from starlette.requests import ClientDisconnect, Request

from gateway.jobs.upload import ArrivingBytes
from mosel.config import Settings
from mosel.errors import Cancelled, DeadlineExceeded, InvalidRequest
from mosel.runtime.messages import check_message, limit_bytes

# The most that is decompressed at once, so that a little of a bomb shows what it is.
_STEP = 256 * 1024
# Window bits of zlib, by content encoding.
_ENCODINGS = {"gzip": 31, "deflate": 15}
_COMPRESS = {"gzip": partial(gzip.compress, compresslevel=1), "deflate": partial(zlib.compress, level=1)}
# Many clients accept compressed answers unasked; less is not worth the time.
_LEAST_COMPRESSED = 4096


class Bodies:
    """Reads bodies.

    Args:
        settings: limits.
        arriving: what all bodies together may take.
    """

    def __init__(self, settings: Settings, arriving: ArrivingBytes) -> None:
        self._limit, self._arriving = limit_bytes(settings.transport.max_message_mib), arriving
        self._seconds = settings.gateway.max_body_ms / 1000

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[memoryview]:
        """The body, decompressed; it counts as arriving inside the block.

        Raises:
            PayloadTooLarge: it has more bytes than a message may have; no more than that were held.
            Overloaded: all bodies together would take more than they may.
            DeadlineExceeded: it is not there in time.
            Cancelled: the caller went away.
            InvalidRequest: it is not compressed as its header says.
        """
        pieces = _pieces(request)
        # Before it is read; a server lets no length pass that is no number.
        check_message("the body has", int(request.headers.get("content-length", 0)), self._limit)
        body = bytearray()
        with self._arriving.growing() as take:
            try:
                async with asyncio.timeout(self._seconds), contextlib.aclosing(pieces):
                    async for piece in pieces:
                        check_message("the body has at least", len(body) + len(piece), self._limit)
                        take(len(piece))
                        body += piece
            except TimeoutError:
                raise DeadlineExceeded(
                    f"{len(body)} bytes of the body were there after {self._seconds:g} s; "
                    "expected all of it by then (setting gateway.max_body_ms)"
                ) from None
            except ClientDisconnect:
                raise Cancelled("the caller went away") from None
            yield memoryview(body).toreadonly()


def compressed(body: bytes, accepted: str) -> tuple[bytes, dict[str, str]]:
    """The body of a response as its caller would have it, and the header that says how that is.

    Args:
        body: of the response.
        accepted: the header `Accept-Encoding`; of several encodings the first counts that is known here.
    """
    if len(body) >= _LEAST_COMPRESSED:
        for choice in accepted.lower().split(","):
            encoding, _, weight = choice.replace(" ", "").partition(";")
            if encoding in _COMPRESS and weight.rstrip("0.") != "q=":
                return _COMPRESS[encoding](body), {"content-encoding": encoding}
    return body, {}


def _pieces(request: Request) -> AsyncGenerator[bytes, None]:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding == "identity":
        return request.stream()
    if encoding not in _ENCODINGS:
        known = ", ".join(_ENCODINGS)
        raise InvalidRequest(f"header content-encoding is {reprlib.repr(encoding)}; expected one of {known}, or none")
    return _decompressed(request.stream(), encoding)


async def _decompressed(compressed: AsyncIterator[bytes], encoding: str) -> AsyncGenerator[bytes, None]:
    decompressor = zlib.decompressobj(_ENCODINGS[encoding])
    try:
        async for data in compressed:
            while data or not decompressor.eof:
                piece = await asyncio.to_thread(decompressor.decompress, data, _STEP)
                data = decompressor.unconsumed_tail
                yield piece
                if len(piece) < _STEP:
                    break
            if decompressor.unused_data:
                raise InvalidRequest(f"the body goes on behind the end of its {encoding} data; expected nothing there")
    except zlib.error as error:
        raise InvalidRequest(f"the body is no {encoding} data: {error}") from None
    if not decompressor.eof:
        raise InvalidRequest(f"the body ends before its {encoding} data does")
