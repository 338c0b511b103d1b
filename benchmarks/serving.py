"""A server of a bundle beside FastAPI and torch: requests per second, latencies, and CPU time of a request.

    python -m benchmarks.serving [--quick] [--cases "1 row"]

The model has 26 features with 20,000 ids of 64 bits and vectors of width 16 each, and an MLP 416 → 256 → 128 → 1. Both
servers have the same weights and get the same requests, JSON in the form of ``/predict``; their scores are compared.
The peer (``benchmarks/peers/fastapi_server.py``) is a pydantic model of the request, a dictionary from ids to rows and
``nn.Embedding``, with the same HTTP parser and event loop (uvicorn, httptools, uvloop). Each server is one process with
one thread, and the clients are another process; if there are several cores, servers and clients have different ones.

Cases are the rows of a request and the number of clients, each with one request in flight. Metrics:

- ``requests``: requests per second.
- ``p50`` and ``p99``: latencies in ms at the rate that is half of what the peer can do with as many clients.
- ``cpu``: CPU time of the server for a request in µs, which other programs on the machine hardly change.

``binary`` sends the binary tensors of the Open Inference Protocol to our server, and JSON to the peer.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks import harness
from benchmarks.peers.fastapi_server import mlp
from benchmarks.peers.load import Load, measure, post
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.publish import write_bundle
from recis_hybrid.serving import Bundle

FEATURES, ROWS, DIM = 26, 20_000, 16
NAMES = [f"feature{number:02d}" for number in range(FEATURES)]
IDS = np.random.default_rng(0).permutation(np.unique(np.random.default_rng(1).integers(-(2**63), 2**63, ROWS)))
PEER = "FastAPI + torch"
CASES = [(1, 1), (1, 16), (1, 64), (64, 1), (64, 16), (64, 64)]


@dataclass
class Server:
    """A server process and its measurements."""

    port: int
    process: subprocess.Popen[bytes]
    loads: dict[str, list[Load]] = field(default_factory=dict)
    cpu_us: dict[str, list[float]] = field(default_factory=dict)

    def cpu_seconds(self) -> float:
        """Return the CPU time of the process."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def run(self, key: str, requests: list[bytes], clients: int, count: int, rate: float | None = None) -> Load:
        """Measure a number of requests and keep the figures."""
        before = self.cpu_seconds()
        load = measure(self.port, requests, clients, count, rate)
        self.cpu_us.setdefault(key, []).append((self.cpu_seconds() - before) / count * 1e6)
        self.loads.setdefault(key, []).append(load)
        if load.failed:
            raise RuntimeError(f"{load.failed} of {count} requests failed")
        return load

    def median(self, key: str, name: str) -> float:
        """Return the median of a figure over the rounds."""
        return statistics.median(getattr(load, name) for load in self.loads[key])


def write_model(folder: Path) -> None:
    """Write the bundle, and the same weights for the peer."""
    torch.manual_seed(0)
    engine = EmbeddingEngine({name: EmbeddingConfig(dim=DIM) for name in NAMES})
    ids = torch.from_numpy(IDS)
    vectors = engine({name: ids for name in NAMES})
    tower = mlp(FEATURES * DIM)

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = tower

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.layers(torch.cat(inputs, 1))
            return scores

    batch = {name: ids[:2] for name in NAMES}
    write_bundle(folder / "ranker", 1, features=None, engine=engine, tower=Tower().eval(), inputs=NAMES, batch=batch)
    tables = {f"table.{name}": vectors[name].detach().contiguous().clone() for name in NAMES}
    save_file({"ids": ids, **tables, **tower.state_dict()}, folder / "peer.safetensors")


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[dict[str, Server]]:
    """Start both servers."""
    ports = [free_port(), free_port()]
    commands = {
        "ours": ["-m", "recis_hybrid.serving.server.cli", str(folder / "ranker"), "--port", str(ports[0])],
        PEER: ["-m", "benchmarks.peers.fastapi_server", str(folder / "peer.safetensors"), str(ports[1])],
    }
    found: dict[str, Server] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        for port, (name, command) in zip(ports, commands.items(), strict=True):
            process = stack.enter_context(
                subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL)
            )
            stack.callback(process.terminate)
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(process.pid, cores[:1])
            found[name] = Server(port, process)
        for server in found.values():
            while not is_ready(server):
                if server.process.poll() is not None:
                    raise RuntimeError("a server has ended")
        yield found


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def is_ready(server: Server) -> bool:
    """Return whether a server answers."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health") as answer:
        return bool(answer.status == 200)
    return False


def json_requests(rows: int, number: int = 32) -> tuple[list[bytes], list[dict[str, list[int]]]]:
    """Return requests and their columns; the ids of a request are random."""
    random = np.random.default_rng(rows)
    columns = [{name: random.choice(IDS, rows).tolist() for name in NAMES} for _ in range(number)]
    bodies = [json.dumps({"columns": each}, separators=(",", ":")).encode() for each in columns]
    return [post("/predict", body, ["Content-Type: application/json"]) for body in bodies], columns


def binary_requests(columns: list[dict[str, list[int]]]) -> list[bytes]:
    """Return the same requests in the binary form of the protocol."""
    requests = []
    for each in columns:
        inputs = [
            {
                **{"name": name, "datatype": "INT64", "shape": [len(ids)]},
                "parameters": {"binary_data_size": 8 * len(ids)},
            }
            for name, ids in each.items()
        ]
        head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        body = head + b"".join(np.array(ids, np.int64).tobytes() for ids in each.values())
        requests.append(post("/v2/models/ranker/infer", body, [f"Inference-Header-Content-Length: {len(head)}"]))
    return requests


def compare_scores(found: dict[str, Server], columns: dict[str, list[int]], bundle: Bundle) -> None:
    """Raise if the servers' scores of a request differ by more than the rounding of float32."""
    body = json.dumps({"columns": columns}).encode()
    expected = bundle.predict(columns)["score"]
    for server in found.values():
        request = urllib.request.Request(
            f"http://127.0.0.1:{server.port}/predict", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            scores = np.array(json.load(answer)["outputs"]["score"])
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


def report(found: dict[str, Server], case: str) -> None:
    """Print the figures of a case."""
    ours, peer = found["ours"], found[PEER]

    def line(metric: str, unit: str, a: float, b: float, ratio: float) -> None:
        harness.Result("serving", case, metric, unit, a, b, PEER, ratio).print()

    rates = [server.median(case, "requests_per_s") for server in (ours, peer)]
    line("requests", "requests/s", *rates, rates[0] / rates[1])
    for metric, name in (("p50", "p50_ms"), ("p99", "p99_ms")):
        times = [server.median(f"{case}@", name) for server in (ours, peer)]
        line(metric, "ms", *times, times[1] / times[0])
    costs = [statistics.median(server.cpu_us[case]) for server in (ours, peer)]
    line("cpu", "us/request", *costs, costs[1] / costs[0])


def main() -> None:
    """Measure the cases."""
    parser = harness.parser(__doc__ or "", devices=("cpu",))
    args = parser.parse_args()
    rounds, seconds = (3, 0.5) if args.quick else (9, 1.5)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        write_model(folder)
        bundle = Bundle(folder / "ranker")
        with servers(folder) as found:
            # The clients leave the servers' core to them.
            os.sched_setaffinity(0, cores[1:] or cores)
            cases = [(rows, clients, "") for rows, clients in CASES] + [(64, 16, ", binary")]
            for rows, clients, form in cases:
                case = f"{rows} row{'s' * (rows > 1)}, {clients} client{'s' * (clients > 1)}{form}"
                if args.cases not in case:
                    continue
                harness.progress(case)
                requests, columns = json_requests(rows)
                compare_scores(found, columns[0], bundle)
                sent = {"ours": binary_requests(columns) if form else requests, PEER: requests}
                run_case(found, case, sent, clients, rounds, seconds)
                report(found, case)


def run_case(
    found: dict[str, Server], case: str, sent: dict[str, list[bytes]], clients: int, rounds: int, seconds: float
) -> None:
    """Measure a case: the servers in turn, at full speed, and then at half of the peer's speed."""
    speeds = {name: measure(s.port, sent[name], clients, 100 + 4 * clients).requests_per_s for name, s in found.items()}
    for _ in range(rounds):
        for name, server in found.items():
            load = server.run(case, sent[name], clients, max(50, int(speeds[name] * seconds)))
            speeds[name] = load.requests_per_s
    rate = found[PEER].median(case, "requests_per_s") / 2
    for _ in range(rounds):
        for name, server in found.items():
            server.run(f"{case}@", sent[name], clients, max(50, int(rate * seconds)), rate)


if __name__ == "__main__":
    main()
