"""Bodies of requests: read up to a limit, and decompressed up to the same limit."""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from recis_hybrid.serving.server.errors import DisconnectedError, RequestError

Receive = Callable[[], Awaitable[Any]]
# Window sizes of zlib: 32 adds the detection of gzip and zlib headers.
_GZIP, _ZLIB = 31, 15


class Memory:
    """The memory for the bodies of all requests.

    Args:
        limit: Number of bytes.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit

    def take(self, size: int) -> None:
        """Take a number of bytes; raise RequestError if there are not as many."""
        if size > self._left:
            raise RequestError(503, "the server is overloaded by large requests. Try again later.", close=True)
        self._left -= size

    def give_back(self, size: int) -> None:
        """Return bytes that have been taken."""
        self._left += size


class Share:
    """The part of a memory that one request has taken; a context, which returns it at the end.

    Args:
        memory: The memory.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._taken = 0

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *error: object) -> None:
        self._memory.give_back(self._taken)

    def take(self, size: int) -> None:
        """Take a number of bytes more; raise RequestError if there are not as many."""
        self._memory.take(size)
        self._taken += size


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], limit: int, share: Share) -> bytes:
    """Read and decompress the body of a request.

    Args:
        receive: Source of the request's ASGI messages.
        headers: Headers by name in lower case.
        limit: Largest number of bytes, before and after decompression. Reading stops beyond it.
        share: Memory for the body.

    Returns:
        The decompressed body.

    Raises:
        RequestError: The body is too large, cannot be decompressed, or there is no memory for it.
        DisconnectedError: The connection was closed before the end of the body.
    """
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding not in (b"identity", b"", b"gzip", b"x-gzip", b"deflate"):
        text = encoding.decode("latin-1")[:100]
        raise RequestError(415, f"Content-Encoding must be gzip, deflate or identity, got {text!r}.", close=True)
    length = headers.get(b"content-length")
    # The HTTP parser has checked that it is a number.
    if length is not None and int(length) > limit:
        raise _too_large(limit)
    message = await receive()
    if message["type"] != "http.request":
        raise DisconnectedError
    body: bytes = message.get("body", b"")
    share.take(len(body))
    if message.get("more_body", False):
        parts, size = [body], len(body)
        while message.get("more_body", False):
            if size > limit:
                raise _too_large(limit)
            message = await receive()
            if message["type"] != "http.request":
                raise DisconnectedError
            parts.append(message.get("body", b""))
            share.take(len(parts[-1]))
            size += len(parts[-1])
        body = b"".join(parts)
    if len(body) > limit:
        raise _too_large(limit)
    if encoding in (b"identity", b""):
        return body
    unpacked = _decompressed(body, encoding == b"deflate", limit)
    share.take(len(unpacked))
    return unpacked


def _decompressed(body: bytes, deflate: bool, limit: int) -> bytes:
    name = "deflate" if deflate else "gzip"
    engine = zlib.decompressobj(_ZLIB if deflate else _GZIP)
    try:
        text = engine.decompress(body, limit + 1)
    except zlib.error as error:
        raise RequestError(400, f"the body is not valid {name}: {error}.") from error
    if len(text) > limit:
        raise RequestError(413, f"the body must have at most {limit} bytes after decompression.")
    if not engine.eof:
        raise RequestError(400, f"the body is not valid {name}: its end is missing.")
    if engine.unused_data:
        raise RequestError(400, f"the body is not valid {name}: {len(engine.unused_data)} bytes follow its end.")
    return text


def _too_large(limit: int) -> RequestError:
    text = f"the body must have at most {limit} bytes. Send fewer rows, or start the server with a larger limit."
    return RequestError(413, text, close=True)
