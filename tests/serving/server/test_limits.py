"""Limits of bodies: sizes, compression, and clients that stop sending."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from recis_hybrid.serving.server import Server, ServerOptions
from tests.serving.server.servers import GOOD, predict, request, running
from tests.serving.server.stand_in import write_model

LIMIT = 100_000
BODY = json.dumps({"columns": GOOD}).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("limited") / "shop"
    write_model(folder, 7, 1.0)
    with running(folder, max_request_bytes=LIMIT) as server:
        yield server


def raw(server: Server, *parts: bytes) -> tuple[int, str]:
    """Send bytes; return status and body of the answer, which the server must end by closing the connection."""
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def post(*headers: str) -> bytes:
    return "\r\n".join(["POST /predict HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def test_a_body_that_is_too_large_is_not_read(server: Server) -> None:
    # The header alone is answered: nothing has been sent of the body.
    status, body = raw(server, post("Content-Length: 1000000000"))
    assert (status, f"must have at most {LIMIT} bytes" in body) == (413, True)
    assert predict(server)[0] == 200


def test_chunks_are_read_up_to_the_limit(server: Server) -> None:
    assert raw(server, post("Transfer-Encoding: chunked", "Connection: close"), *chunks(BODY, 50))[0] == 200
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert raw(server, post("Transfer-Encoding: chunked"), chunk, chunk)[0] == 413
    # One chunk that claims to be large.
    assert raw(server, post("Transfer-Encoding: chunked"), b"fffffff0\r\n" + b" " * (LIMIT + 1))[0] == 413
    for size in (b"zz", b"-1", b"f" * 40):
        assert raw(server, post("Transfer-Encoding: chunked"), size + b"\r\n")[0] == 400
    assert predict(server)[0] == 200


def chunks(body: bytes, size: int) -> list[bytes]:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return [*(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts), b"0\r\n\r\n"]


def test_a_body_that_does_not_arrive_times_out(tmp_path: Path) -> None:
    write_model(tmp_path, 7, 1.0)
    with running(tmp_path, timeout=0.5) as server:
        status, body = raw(server, post("Content-Length: 100"), b"{")
    assert (status, json.loads(body)["error"]) == (408, "the body did not arrive within 0.5 s.")


def test_bodies_in_memory_are_limited_together(server: Server) -> None:
    address = urlsplit(server.url)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = socket.create_connection((address.hostname, address.port), timeout=60)
            stack.enter_context(connection)
            connection.sendall(post(f"Content-Length: {LIMIT}") + b" " * (LIMIT - 1))
        while predict(server)[0] != 503:
            pass
        status, body = raw(server, post(f"Content-Length: {len(BODY)}"), BODY)
        assert (status, "overloaded by large requests" in body) == (503, True)
    while predict(server)[0] != 200:
        pass


def test_a_client_may_disconnect_within_a_body(server: Server) -> None:
    address = urlsplit(server.url)
    for _ in range(20):
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            connection.sendall(post("Content-Length: 100") + b"{")
    assert predict(server)[0] == 200


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_compressed_bodies(server: Server, name: str) -> None:
    def send(body: bytes) -> tuple[int, str]:
        status, answer, _ = request(server, "/predict", body, {"Content-Encoding": name})
        return status, answer.get("error", "")

    compress = gzip.compress if name == "gzip" else zlib.compress
    packed = compress(BODY)
    assert send(packed) == (200, "")
    assert send(BODY)[0] == 400
    assert send(packed[:-1]) == (400, f"the body is not valid {name}: its end is missing.")
    assert send(packed + b"12") == (400, f"the body is not valid {name}: 2 bytes follow its end.")
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 255
    assert send(bytes(damaged))[0] == 400
    # 50 MB within 50 kB.
    bomb = compress(b" " * 50_000_000)
    assert len(bomb) < LIMIT
    assert send(bomb) == (413, f"the body must have at most {LIMIT} bytes after decompression.")


def test_other_encodings_are_refused(server: Server) -> None:
    for name in ("br", "gzip, gzip", "zstd"):
        status, answer, _ = request(server, "/predict", BODY, {"Content-Encoding": name})
        assert (status, "must be gzip, deflate or identity" in answer["error"]) == (415, True)


def test_lines_that_are_not_http(server: Server) -> None:
    for line in (b"\0\xff\r\n\r\n", b"POST /predict HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        assert raw(server, line)[0] == 400
    assert predict(server)[0] == 200


@pytest.mark.parametrize(
    "options",
    [
        *({name: 0} for name in ("threads", "max_request_bytes", "max_batch", "max_queue", "timeout")),
        *({"timeout": float("nan")}, {"poll": -1.0}, {"poll": float("inf")}, {"port": 65536}, {"name": "a/b"}),
    ],
)
def test_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ServerOptions(**options)  # type: ignore[arg-type]
