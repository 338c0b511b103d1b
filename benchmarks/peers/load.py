"""A load generator for HTTP servers: keep-alive connections, one request in flight on each, in one process.

It does little for a request, in about 20 µs: the request is made before, and of the answer only status and length are
read. The server must send ``Content-Length``.
"""

from __future__ import annotations

import re
import select
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Load:
    """Figures of one measurement."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    failed: int


def post(path: str, body: bytes, headers: Sequence[str] = ()) -> bytes:
    """Return the bytes of a POST request."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def measure(port: int, requests: Sequence[bytes], clients: int, count: int, rate: float | None = None) -> Load:
    """Send requests over a number of connections, each with one request in flight.

    Args:
        port: Port on this machine.
        requests: Requests, sent in turn.
        clients: Number of connections.
        count: Number of requests in all.
        rate: Requests per second. A latency then counts from the time at which its request was due, also if all
            connections were busy. None sends the next request as soon as a connection is free.

    Returns:
        Rate and latencies.
    """
    poll = select.epoll()
    connections: dict[int, socket.socket] = {}
    for _ in range(min(clients, count)):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections[connection.fileno()] = connection
        poll.register(connection.fileno(), select.EPOLLIN)
    free = list(connections)
    due: dict[int, float] = {}
    answers: dict[int, tuple[bytes, int]] = {}
    times: list[float] = []
    sent = failed = 0
    begin = time.perf_counter()
    while len(times) < count:
        now = time.perf_counter()
        wait = -1.0
        while free and sent < count:
            at = now if rate is None else begin + sent / rate
            if at > now:
                wait = at - now
                break
            number = free.pop()
            due[number] = at
            connections[number].sendall(requests[sent % len(requests)])
            sent += 1
        for number, _ in poll.poll(wait):
            before, needed = answers.pop(number, (b"", 0))
            data = before + connections[number].recv(1 << 18)
            if len(data) == len(before):
                raise ConnectionError("the server closed a connection")
            if not needed:
                end = data.find(b"\r\n\r\n")
                match = _LENGTH.search(data, 0, end + 2) if end >= 0 else None
                needed = 0 if match is None else end + 4 + int(match[1])
            if not needed or len(data) < needed:
                answers[number] = data, needed
                continue
            times.append(time.perf_counter() - due.pop(number))
            failed += not data.startswith(b"HTTP/1.1 200")
            free.append(number)
    seconds = time.perf_counter() - begin
    for connection in connections.values():
        connection.close()
    poll.close()
    cuts = statistics.quantiles(times, n=100)
    return Load(count / seconds, cuts[49] * 1000, cuts[98] * 1000, failed)
