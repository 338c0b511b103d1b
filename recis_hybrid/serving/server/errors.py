"""Errors that end a request with a status other than 200."""

from __future__ import annotations


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        text: Message for the client: what is wrong, and the remedy.
        close: Whether to close the connection, because the request has not been read to its end.
    """

    def __init__(self, status: int, text: str, *, close: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.close = close


class DisconnectedError(Exception):
    """The client has closed the connection before the end of its request."""
