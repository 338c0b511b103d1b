"""Malformed requests to a server: each must get an answer that explains it, and the server must stay as it was.

    python -m tests.serving.server.fuzz [--requests 10000] [--seed 0]

A third of the requests are valid, and their scores are compared. The others are valid requests with changes: values of
the JSON replaced, bytes changed, binary sizes and headers that are wrong, damaged or endless compression, chunks, and
lines that are not HTTP. The script prints one JSON line with the number of answers by status, and the memory of the
server after a fifth of the requests and at the end.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import socket
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tests.serving.server.stand_in import write_model

LIMIT = 2**20
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 13.5, 1e308, 2**31, 2**63, -(2**63), 2**64, 10**40, "", "1", "x" * 1000),
    *(
        [],
        {},
        [[]],
        [None],
        [1, "a"],
        [[1], 2],
        [1.5],
        {"a": 1},
        [[[[1]]]],
        "\0\ud83d\ude00",
        [2**64] * 3,
        ["y" * 20_000, 1, 2],
    ),
)


@dataclass(frozen=True)
class Sent:
    """A request as bytes, and the scores that must be answered; None if an error may be.

    After one that is not complete, the client ends the connection, because a server would wait for the rest.
    """

    data: bytes
    scores: list[float] | None = None
    is_complete: bool = True


@dataclass
class Findings:
    """Answers by status, and the requests that were not answered as they must be."""

    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def http(path: str, body: bytes, headers: dict[str, str], method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in {"Content-Length": str(len(body)), **headers}.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Fuzzer:
    """Makes requests; the same seed makes the same ones."""

    def __init__(self, seed: int, model: str) -> None:
        self._random = random.Random(seed)
        self._infer = f"/v2/models/{model}/infer"

    def request(self) -> Sent:
        kinds: list[Callable[[], Sent]] = [
            *(self.valid, self.valid, self.replaced, self.replaced, self.damaged),
            *(self.binary, self.compressed, self.headers, self.line),
        ]
        return self._random.choice(kinds)()

    def document(self) -> tuple[str, dict[str, Any], bytes, list[float]]:
        """Return path, JSON, binary data and scores of a valid request."""
        rows = self._random.choice([1, 1, 2, 5, 40])
        user = [self._random.randrange(20, 1000) for _ in range(rows)]
        items = [[self._random.randrange(100) for _ in range(self._random.randrange(4))] for _ in range(rows)]
        text = ["x" * self._random.randrange(5) for _ in range(rows)]
        price = [[1.0, 2.0]] * rows
        scores = [float(u + sum(i) + len(t)) for u, i, t in zip(user, items, text, strict=True)]
        if self._random.random() < 0.3:
            return "/predict", {"columns": dict(user=user, items=items, text=text, price=price)}, b"", scores
        flat = [value for row in items for value in row]
        tensors: list[tuple[str, str, list[int], list[Any]]] = [
            ("user", "INT64", [rows], user),
            ("items", "INT64", [len(flat)], flat),
            ("items.lengths", "INT64", [rows], [len(row) for row in items]),
            ("text", "BYTES", [rows], text),
            ("price", "FP32", [rows, 2], price),
        ]
        inputs, tail = [], b""
        binary = self._random.random() < 0.5
        for name, datatype, shape, data in tensors:
            tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
            if binary and name != "text":
                raw = np.array(data, np.int64 if datatype == "INT64" else np.float32).tobytes()
                tensor["parameters"] = {"binary_data_size": len(raw)}
                tail += raw
            else:
                tensor["data"] = data
            inputs.append(tensor)
        outputs = [{"name": "score", "parameters": {"binary_data": False}}]
        return self._infer, {"id": "a", "inputs": inputs, "outputs": outputs}, tail, scores

    def encoded(self) -> tuple[str, bytes, dict[str, str], list[float]]:
        path, document, tail, scores = self.document()
        text = json.dumps(document).encode()
        return path, text + tail, {"Inference-Header-Content-Length": str(len(text))} if tail else {}, scores

    def valid(self) -> Sent:
        path, body, headers, scores = self.encoded()
        if self._random.random() < 0.3:
            return Sent(http(path, gzip.compress(body), {**headers, "Content-Encoding": "gzip"}), scores)
        return Sent(http(path, body, headers), scores)

    def replaced(self) -> Sent:
        """Replace, remove or repeat values at any depth of the JSON."""
        path, document, tail, _ = self.document()
        for _ in range(self._random.choice([1, 1, 2, 4])):
            holder: Any = document
            while True:
                places: list[Any] = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
                if not places:
                    break
                place = self._random.choice(places)
                if isinstance(holder[place], dict | list) and self._random.random() < 0.8:
                    holder = holder[place]
                    continue
                action = self._random.random()
                if action < 0.7:
                    holder[place] = json.loads(json.dumps(self._random.choice(VALUES)))
                elif action < 0.85 or isinstance(holder, dict):
                    del holder[place]
                else:
                    holder.insert(place, holder[place])
                break
        text = json.dumps(document).encode()
        return Sent(http(path, text + tail, {"Inference-Header-Content-Length": str(len(text))} if tail else {}))

    def bent(self, data: bytes) -> bytes:
        """Change, insert, remove or repeat some bytes, or cut the end."""
        changed = bytearray(data)
        for _ in range(self._random.choice([1, 1, 2, 8])):
            place = self._random.randrange(len(changed) + 1)
            action = self._random.randrange(5)
            if action == 0 and place < len(changed):
                changed[place] = self._random.randrange(256)
            elif action == 1:
                changed[place:place] = self._random.randbytes(self._random.choice([1, 4, 100]))
            elif action == 2:
                del changed[place : place + self._random.choice([1, 4, 100])]
            elif action == 3:
                changed[place:place] = changed[place : place + 20] * self._random.choice([1, 50])
            else:
                del changed[place:]
        return bytes(changed)

    def damaged(self) -> Sent:
        path, body, headers, _ = self.encoded()
        if self._random.random() < 0.05:
            deep = b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}"
            return Sent(http(path, self._random.choice([b"[" * 200_000, deep, b" " * LIMIT * 2]), {}))
        return Sent(http(path, self.bent(body), headers))

    def binary(self) -> Sent:
        path, document, tail, _ = self.document()
        inputs = document.get("inputs", [])
        for tensor in inputs:
            if "parameters" in tensor and self._random.random() < 0.5:
                size = tensor["parameters"]["binary_data_size"]
                sizes = [size - 1, size + 8, -1, 2**70, 0, "8", None]
                tensor["parameters"]["binary_data_size"] = self._random.choice(sizes)
            if self._random.random() < 0.3:
                tensor["shape"] = self._random.choice([[], [2**39, 2**39], [0], [-1], [1, 1], ["1"], [3] * 9, [2**62]])
            if self._random.random() < 0.2:
                tensor["datatype"] = self._random.choice(["BYTES", "BOOL", "FP16", "UINT64", "INT8", "BF16", "", None])
        text = json.dumps(document).encode()
        right = len(text)
        length = self._random.choice([right, right, right - 1, right + 1, 0, 10**18, -5, "x", "1" * 5000])
        return Sent(http(path, text + self.bent(tail), {"Inference-Header-Content-Length": str(length)}))

    def compressed(self) -> Sent:
        path, body, headers, _ = self.encoded()
        name = self._random.choice(["gzip", "deflate", "deflate", "br", "gzip, gzip", "", "\u00ff"])
        packed = gzip.compress(body) if name == "gzip" else zlib.compress(body)
        if self._random.random() < 0.1:
            packed = gzip.compress(bytes(LIMIT * 20), 9)
        elif self._random.random() < 0.7:
            packed = self.bent(packed)
        return Sent(http(path, packed, {**headers, "Content-Encoding": name}))

    def headers(self) -> Sent:
        path, body, headers, _ = self.encoded()
        action = self._random.randrange(7)
        if action == 0:
            headers["Content-Length"] = str(self._random.choice([0, 1, len(body) - 1, 10**12]))
        elif action == 1:
            paths = ["/", "/v2/models/", "/v2/models/%00/infer", "/v2/models/x/infer", "/%zz", "/predict/"]
            path = self._random.choice(paths)
        elif action == 2:
            headers["Accept-Encoding"] = self._random.choice(["gzip;q=x", ",,,", "gzip" * 1000, "\u00ff", "*;q=0"])
        elif action == 3:
            headers["Content-Type"] = self._random.choice(["multipart/form-data", "text/plain", "\0"])
        elif action == 4:
            headers["X"] = "y" * self._random.choice([10, 10_000, 200_000])
        elif action == 5:
            return Sent(http(path, body, headers, self._random.choice(["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])))
        else:
            size = self._random.choice(["5", "ffffff", "-1", "zz", "f" * 30, "0", "1000000000"])
            data = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{size}\r\n".encode()
            return Sent(data + body, is_complete=False)
        return Sent(http(path, body, headers), is_complete=False)

    def line(self) -> Sent:
        action = self._random.randrange(3)
        if action == 0:
            return Sent(self._random.randbytes(self._random.choice([1, 30, 3000])), is_complete=False)
        path, body, headers, _ = self.encoded()
        data = http(path, body, headers)
        data = self.bent(data) if action == 1 else data[: self._random.randrange(len(data))]
        return Sent(data, is_complete=False)


def send(address: tuple[str, int], sent: Sent) -> str | None:
    """Send a request, and read the answer to its end.

    Returns:
        The status, or "closed" if an incomplete request had no answer; None if the answer is not what it must be.
    """
    answer = b""
    try:
        with socket.create_connection(address, timeout=60) as connection:
            try:
                connection.sendall(sent.data)
                if not sent.is_complete:
                    connection.shutdown(socket.SHUT_WR)
            # The server may answer and close before it has read everything.
            except (BrokenPipeError, ConnectionResetError):
                pass
            while data := connection.recv(1 << 16):
                answer += data
    except (ConnectionResetError, OSError) as error:
        if isinstance(error, TimeoutError):
            return None
    if not answer:
        return None if sent.is_complete else "closed"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split()[1].decode()
    if sent.scores is not None:
        if status != "200":
            return None
        document = json.loads(body)
        outputs = document["outputs"]
        found = outputs["score"] if isinstance(outputs, dict) else outputs[0]["data"]
        return status if found == sent.scores else None
    explained = status == "200" or b"content-type: text/plain" in head or b'{"error"' in body
    return status if explained and status != "500" else None


def fuzz(address: tuple[str, int], requests: int, seed: int, model: str, progress: Callable[[int], None]) -> Findings:
    """Send requests, and every tenth time a valid one besides."""
    fuzzer, findings = Fuzzer(seed, model), Findings()
    for number in range(requests):
        sent = fuzzer.valid() if number % 10 == 9 else fuzzer.request()
        status = send(address, sent)
        if status is None:
            findings.faults.append(f"request {number}: {sent.data[:300]!r}")
        else:
            findings.statuses[status] += 1
        progress(number + 1)
    return findings


def resident_mb(process: int) -> float:
    """Return the anonymous memory of a process in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


SERVER = """
import logging, sys
from pathlib import Path
from recis_hybrid.serving.server import Server, ServerOptions
from tests.serving.server.stand_in import SumSource
logging.disable(logging.WARNING)
options = ServerOptions(port=0, max_request_bytes=int(sys.argv[2]), timeout=5)
server = Server(sys.argv[1], options, source=SumSource(Path(sys.argv[1])))
print(server.url, flush=True)
server.run()
"""


def main() -> int:
    """Run the fuzzer against a server in another process."""
    parser = argparse.ArgumentParser(description="Send malformed requests to a server.")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "shop", 7, 1.0)
        command = [sys.executable, "-c", SERVER, f"{folder}/shop", str(LIMIT)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            url = urlsplit(process.stdout.readline().strip())
            assert url.hostname is not None
            assert url.port is not None
            memory: list[float] = []

            def progress(done: int) -> None:
                if done in (args.requests // 5, args.requests):
                    memory.append(resident_mb(process.pid))

            findings = fuzz((url.hostname, url.port), args.requests, args.seed, "shop", progress)
            alive = process.poll() is None
            process.terminate()
            code = process.wait(60)
    for fault in findings.faults[:20]:
        print(fault, file=sys.stderr)
    figures = {
        **{"requests": args.requests, "seed": args.seed, "faults": len(findings.faults), "alive": alive, "exit": code},
        **{"memory_mb": memory, "statuses": dict(sorted(findings.statuses.items()))},
    }
    print(json.dumps(figures))
    return int(bool(findings.faults) or not alive or code != 0)


if __name__ == "__main__":
    sys.exit(main())
