"""One warm training step of tables that two ranks share: two processes on this machine, connected by Gloo.

    python -m benchmarks.distributed [--quick] [--cases 2ranks] [--threads 1]

Each rank has the workload of ``benchmarks.embedding`` (width 64, row-wise Adagrad) with its own batches. Steps of ours
and the peer alternate.

- ``2ranks/...``: million ids per second of both ranks together; peer: TorchRec's DistributedModelParallel with row-wise
  sharding, like ours, or table-wise sharding. TorchRec is given row indices into tables of fixed size.
- ``wire/...``: bytes sent to the other rank per distinct id, compared with 8 + 2 · 4 · width; and the speed of a step
  relative to float32.
- ``overlap/...``: the exchange of ids (``rows``: also of rows) is delayed by 20 ms, with and without prefetching, in a
  step with a tower. ``share_hidden`` is the share of the delay that prefetching hides.
"""

from __future__ import annotations

import argparse
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks import harness, workload
from benchmarks.embedding import LR, FixedGradient
from benchmarks.peers.worker import ENVIRONMENTS, Worker
from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine

DIM = 64
RANKS = 2
DELAY_S = 0.02
WIRES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = ["2ranks/row", "2ranks/table", *(f"wire/{name}" for name in WIRES), "overlap/ids", "overlap/rows"]
QUICK = ["2ranks/row", "wire/bfloat16", "overlap/ids"]


class Rank:
    """The engines and steps of one rank."""

    def __init__(self, rank: int, size: str) -> None:
        self.work = workload.make(size, DIM, torch.device("cpu"))
        self.batches = [self.work.batch(number) for number in range(rank, workload.BATCHES, RANKS)]
        self.steps: dict[str, Callable[[], None]] = {}
        self.engines: dict[str, EmbeddingEngine] = {}
        self.delays: dict[str, float] = {}

    def make(self, name: str, options: dict[str, Any], tower: bool, delays: dict[str, float]) -> None:
        engine = EmbeddingEngine(
            {workload.name(f): EmbeddingConfig(dim=DIM) for f in range(workload.FEATURES)},
            optimizer=optim.RowwiseAdagrad,
            **{"prefetch_depth": 0, **options},
        )
        optimizer = optim.RowwiseAdagrad(engine.parameters(), lr=LR)
        with torch.no_grad():
            for part in range(0, workload.IDS, 10_000):
                engine({workload.name(f): self.work.ids[f][part : part + 10_000] for f in range(workload.FEATURES)})
        self.engines[name] = engine
        for exchange in [engine._sharded.exchange, *([engine._prefetcher.exchange] if engine._prefetcher else [])]:  # type: ignore[union-attr]
            delayed(exchange, delays)
        layers = [nn.Linear(workload.FEATURES * DIM, 256), nn.ReLU(), nn.Linear(256, 1)]
        mlp = nn.Sequential(*layers) if tower else None
        number = count()

        def step() -> None:
            at = next(number)
            batch = self.batches[at % len(self.batches)]
            if options.get("prefetch_depth") and at == 0:
                engine.prefetch(batch)
            values = list(engine(batch).values())
            engine.prefetch(self.batches[(at + 1) % len(self.batches)])
            if mlp is None:
                FixedGradient.apply(self.work.gradients, *values).backward()
            else:
                mlp(torch.cat(values, 1)).mean().backward()
            if options.get("staleness"):
                engine.prefetch_rows()
            optimizer.step()

        self.steps[name] = step

    def run(self, name: str) -> float:
        dist.barrier()
        begin = time.perf_counter()
        self.steps[name]()
        return time.perf_counter() - begin

    def traffic(self, name: str) -> tuple[int, int]:
        """Return the bytes that a step sends, and the number of distinct ids that it sends to the other rank."""
        engine = self.engines[name]
        before, ids = engine.traffic.total, engine.traffic.ids
        self.steps[name]()
        return engine.traffic.total - before, (engine.traffic.ids - ids) // 8

    def drop(self) -> None:
        self.steps, self.engines = {}, {}


def delayed(exchange: Any, delays: dict[str, float]) -> None:
    """Delay the start of exchanges by kind."""
    start = exchange.start

    def delayed_start(kind: str, *args: Any) -> Any:
        time.sleep(delays.get(kind, 0.0))
        return start(kind, *args)

    if delays:
        exchange.start = delayed_start


def serve(rank: int, store: str, size: str, threads: int, connection: Connection) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mine = Rank(rank, size)
    while True:
        try:
            name, *args = connection.recv()
        except EOFError:
            return
        connection.send(getattr(mine, name)(*args))


class Ours:
    """Handle to the processes of both ranks."""

    def __init__(self, size: str, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="recis-bench-")
        context = mp.get_context("spawn")
        store = str(Path(self._folder.name) / "store")
        pipes = [context.Pipe() for _ in range(RANKS)]
        self._ends = [ours for ours, _ in pipes]
        self._processes = [
            context.Process(target=serve, args=(rank, store, size, threads, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()

    def call(self, *command: Any) -> list[Any]:
        for end in self._ends:
            end.send(command)
        return [end.recv() for end in self._ends]

    def step(self, name: str) -> Callable[[], float]:
        return lambda: max(self.call("run", name))

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def torchrec(stack: ExitStack, work: workload.Workload, sharding: str, threads: int) -> Callable[[], float]:
    """Start both ranks of TorchRec, and return their step."""
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    workers = [
        stack.enter_context(
            Worker(
                "torchrec",
                work,
                sharding,
                lr=LR,
                threads=threads,
                clock="wall",
                device=torch.device("cpu"),
                home="fbgemm",
                variables={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(RANKS),
                    "LOCAL_WORLD_SIZE": str(RANKS),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )
        )
        for rank in range(RANKS)
    ]
    for worker in workers:
        worker.wait()

    def step() -> float:
        for worker in workers:
            worker.ask()
        return max(worker.answer() for worker in workers)

    return step


def run(case: str, args: argparse.Namespace, ours: Ours, size: str) -> Iterator[harness.Result]:
    kind, which = case.split("/")
    cpu, rounds, burst = torch.device("cpu"), 5 if args.quick else 12, 4
    ids = RANKS * workload.FEATURES * workload.SIZES[size]

    def result(metric: str, unit: str, first: float, peer: float | None, name: str, ratio: float | None) -> Any:
        return harness.Result(
            "distributed", case, metric, unit, round(first, 3), peer and round(peer, 3), name, ratio and round(ratio, 2)
        )

    def rates(steps: dict[str, Callable[[], float | None]]) -> dict[str, float]:
        return harness.rates(steps, ids, rounds, cpu, burst)

    if kind == "2ranks":
        ours.call("make", case, {}, False, {})
        name = f"torchrec {which}_wise"
        with ExitStack() as stack:
            steps: dict[str, Callable[[], float | None]] = {"ours": ours.step(case)}
            if (ENVIRONMENTS / "fbgemm" / "torchrec").exists():
                steps["peer"] = torchrec(stack, workload.make(size, DIM, cpu), f"{which}_wise", args.threads)
            rate = {each: value / 1e6 for each, value in rates(steps).items()}
        peer = rate.get("peer")
        yield result("train_step", "M ids/s", rate["ours"], peer, name, peer and rate["ours"] / peer)
    elif kind == "wire":
        ours.call("make", case, {"wire_dtype": WIRES[which]}, False, {})
        ours.call("make", "float32", {}, False, {})
        each = [sum(numbers) for numbers in zip(*ours.call("traffic", case), strict=True)]
        bytes_each, bound = each[0] / each[1], 8 + 2 * 4 * DIM
        yield result("wire_bytes", "B/id", bytes_each, bound, "8 + 2*4*width", bound / bytes_each)
        if which != "float32":
            rate = {each: value / 1e6 for each, value in rates({n: ours.step(n) for n in (case, "float32")}).items()}
            yield result("train_step", "M ids/s", rate[case], rate["float32"], "float32", rate[case] / rate["float32"])
    else:
        delays = {"ids": DELAY_S, "rows": DELAY_S} if which == "rows" else {"ids": DELAY_S}
        ahead = {"prefetch_depth": 2, "staleness": int(which == "rows")}
        ours.call("make", "no delay", {}, True, {})
        ours.call("make", "waits", {}, True, delays)
        ours.call("make", "prefetches", ahead, True, delays)
        rate = rates({name: ours.step(name) for name in ("no delay", "waits", "prefetches")})
        seconds = {name: ids / value for name, value in rate.items()}
        hidden = (seconds["waits"] - seconds["prefetches"]) / sum(delays.values())
        yield result("share_hidden", "of the delay", hidden, None, "", None)
        faster = rate["prefetches"] / rate["waits"]
        yield result("train_step", "M ids/s", rate["prefetches"] / 1e6, rate["waits"] / 1e6, "no prefetch", faster)
    ours.call("drop")


def main() -> None:
    args = harness.parser(__doc__ or "").parse_args()
    cases = [case for case in (QUICK if args.quick else CASES) if args.cases in case]
    results = []
    with Ours("65k", args.threads) as ours:
        for case in cases:
            harness.progress(case)
            for line in run(case, args, ours, "65k"):
                results.append(line)
                line.print()
    harness.progress(harness.table(results))


if __name__ == "__main__":
    main()
