"""Servers on threads, and plain HTTP requests to them."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from recis_hybrid.serving.server import Server, ServerOptions
from tests.serving.server.stand_in import SumSource

GOOD: dict[str, Any] = {"user": [1, 2], "items": [[1, 2], []], "text": ["ab", "c"], "price": [[1, 2], [3, 4]]}
SCORES = {"score": [1 + 3 + 2, 2 + 0 + 1], "pair": [[1, 2], [3, 4]]}


@contextlib.contextmanager
def running(folder: Path, **options: Any) -> Iterator[Server]:
    """Serve the newest model of a folder on another thread."""
    server = Server(folder, ServerOptions(port=0, **{"poll": 0.05, **options}), source=SumSource(folder))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.live.layout.bundle.gate.set()
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def connect(server: Server) -> http.client.HTTPConnection:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)


def request(
    server: Server, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Send a request; return status, JSON and headers of the answer."""
    with contextlib.closing(connect(server)) as connection:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if data is None else "POST", path, data, headers or {})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text else {}, {k.lower(): v for k, v in answer.getheaders()}


def predict(server: Server, **columns: Any) -> tuple[int, dict[str, Any]]:
    status, answer, _ = request(server, "/predict", {"columns": {**GOOD, **columns}})
    return status, answer
