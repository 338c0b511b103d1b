"""A cost model of one training step on 1 to 1,024 ranks, compared with measured and published figures.

    python -m benchmarks.scaling [--points FILE] [--table NAME]

Nothing is executed: the model uses the constants in this file and the measurements of
``python -m benchmarks.scaling_points`` on one machine (``benchmarks/scaling_points.json``). docs/scaling.md explains
the model and contains this output.

The step of a rank has ``samples`` samples with ``ids`` ids each, n = samples · ids, of which u are distinct:

- ids, rows, gradients: three all-to-alls of (W - 1) / W · u · (9 | v | v) bytes, with v bytes per vector on the wire;
- memory: reads and writes of ids, slots, records and vectors, at the memory's bandwidth for random rows;
- tower: three times the FLOPs of its forward pass; the all-reduce of its gradients overlaps with backward;
- launches: a few microseconds of host time per kernel;
- host: bytes of input at the bandwidth of a rank's share of the host, in parallel with the rest.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

POINTS = Path(__file__).with_name("scaling_points.json")
SLOT_BYTES = 64
"""Bytes read to look up an id: a cache line."""
RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Resources of a rank. Bandwidths are the achieved ones, in one direction."""

    ranks_per_host: int
    memory: float
    """Bytes per second for random rows of a few hundred bytes."""
    flops: float
    """FLOPs per second in a tower's matrix products."""
    in_host: float
    """Bytes per second that a rank sends to others on its host."""
    between: float
    """Bytes per second that a rank sends to other hosts."""
    collective_s: float
    """Fixed seconds of a collective."""
    peer_s: float
    """Additional seconds of an all-to-all for each rank on another host."""
    launch_s: float
    """Seconds of a kernel launch."""
    ingest: float
    """Bytes of input per second that a rank's share of the host reads and decodes."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Work of a rank in one step."""

    samples: int
    features: int
    ids: float
    """Ids per sample."""
    distinct: float
    """Share of a rank's ids that are distinct."""
    dim: int
    state_bytes: int
    """Bytes of optimizer state per row."""
    parameters: float
    """Parameters of the tower."""
    flops: float
    """FLOPs of the tower's forward pass per sample."""
    kernels: int
    input_bytes: float
    """Bytes of input per sample."""
    wire_bytes: int = 2
    """Bytes per element on the wire."""
    pooled: bool = False
    """True if owners pool bags and send the sums, as in TorchRec and HugeCTR; False if rows are sent once, as here."""


H100 = Machine(
    ranks_per_host=8,
    memory=0.5 * 3.35e12,
    flops=0.35 * 990e12,
    in_host=0.7 * 450e9,
    between=0.8 * 50e9,
    collective_s=25e-6,
    peer_s=0.5e-6,
    launch_s=2e-6,
    ingest=1.5e9,
)
"""A DGX H100: HBM3 3.35 TB/s, 990 TFLOPS in bfloat16, NVLink 450 GB/s, a 400 Gb/s adapter per GPU. The fractions of
these peaks, the latencies and the ingest are assumptions, not measurements."""

DCNV2 = Workload(
    samples=1056,
    features=26,
    ids=214,
    distinct=0.5,
    dim=128,
    state_bytes=4,
    parameters=16.0e6,
    flops=32.1e6,
    kernels=150,
    input_bytes=214 * 4 + 13 * 4 + 4,
    pooled=True,
)
"""MLPerf's DLRM-DCNv2: 26 features of 214 ids, bottom 512-256-128, three cross layers of rank 512, top
1024-1024-512-256-1. The share of distinct ids is assumed."""

CLICKS = Workload(
    samples=4096,
    features=100,
    ids=300,
    distinct=0.4,
    dim=64,
    state_bytes=4,
    parameters=10e6,
    flops=20e6,
    kernels=150,
    input_bytes=300 * 8 + 400,
)
"""A click model of 100 features with three ids each, exchanged as in this package."""


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a step."""

    ids: float
    rows: float
    gradients: float
    memory: float
    tower: float
    all_reduce: float
    launches: float
    host: float

    @property
    def serial(self) -> float:
        """Seconds of a step without prefetching, with input ready."""
        exposed = max(self.all_reduce - 2 / 3 * self.tower, 0.0)
        return self.ids + self.rows + self.gradients + self.memory + self.tower + self.launches + exposed

    @property
    def ahead(self) -> float:
        """Seconds of a step with prefetched ids, with input ready."""
        return self.serial - self.ids

    @property
    def seconds(self) -> float:
        """Seconds of a step with prefetched ids, or of its input if that takes longer."""
        return max(self.ahead, self.host)

    @property
    def communication(self) -> float:
        """Share of embedding exchanges in a step without prefetching."""
        return (self.ids + self.rows + self.gradients) / self.serial


def step(work: Workload, machine: Machine, ranks: int) -> Step:
    """Return the parts of a step."""
    n, vector, element = work.samples * work.ids, 4 * work.dim, work.wire_bytes * work.dim
    u = n * work.distinct
    outputs = work.samples * work.features
    remote = (ranks - 1) / ranks
    record = vector + work.state_bytes
    if work.pooled:
        sent_ids, sent_vectors = 8 * n, outputs * element
        # Owners read a slot and a row for each id and write pooled vectors, then read gradients and update rows.
        moved = n * (8 + SLOT_BYTES + vector) + outputs * 2 * element + n * element + u * 2 * record
    else:
        sent_ids, sent_vectors = 9 * u, u * element
        # Find the distinct ids, look them up, read and send rows, pool, and the same in backward.
        moved = n * (8 + SLOT_BYTES) + u * (8 + SLOT_BYTES + vector + element) + n * vector + outputs * vector
        moved += outputs * vector + n * vector + u * (vector + element) + u * (element + 2 * record)
    return Step(
        ids=all_to_all(sent_ids * remote, machine, ranks),
        rows=all_to_all(sent_vectors * remote, machine, ranks),
        gradients=all_to_all(sent_vectors * remote, machine, ranks),
        memory=moved / machine.memory,
        tower=3 * work.flops * work.samples / machine.flops,
        all_reduce=all_reduce(work.wire_bytes * work.parameters, machine, ranks),
        launches=work.kernels * machine.launch_s,
        host=work.samples * work.input_bytes / machine.ingest,
    )


def all_to_all(sent: float, machine: Machine, ranks: int) -> float:
    """Return the seconds of an all-to-all in which each rank sends ``sent`` bytes, divided evenly over all others."""
    if ranks == 1:
        return 0.0
    near = min(machine.ranks_per_host, ranks) - 1
    inside = sent * near / (ranks - 1)
    far = ranks - 1 - near
    return (
        machine.collective_s + far * machine.peer_s + max(inside / machine.in_host, (sent - inside) / machine.between)
    )


def all_reduce(size: float, machine: Machine, ranks: int) -> float:
    """Return the seconds of a ring all-reduce of ``size`` bytes within hosts and then between them."""
    if ranks == 1:
        return 0.0
    near = min(machine.ranks_per_host, ranks)
    hosts = ranks / near
    inside = 2 * size * (near - 1) / near / machine.in_host
    outside = 2 * size / near * (hosts - 1) / hosts / machine.between
    return 2 * machine.collective_s + math.log2(hosts) * machine.collective_s + inside + outside


def this_machine(constants: dict[str, float], ranks: int) -> Machine:
    """Return the resources of a rank on the measured machine, whose cores and loopback the ranks share.

    Exchanges were measured with two ranks.
    """
    share = min(1.0, constants["cores"] / ranks)
    return Machine(
        ranks_per_host=1 << 20,
        memory=constants["memory"] * share,
        flops=constants["flops"] * share,
        in_host=constants["in_host"] * min(1.0, 2 / ranks),
        between=1.0,
        collective_s=constants["collective_s"],
        peer_s=0.0,
        launch_s=constants["call_s"] if ranks == 1 else constants["shared_call_s"] * max(1.0, ranks / 2),
        ingest=math.inf,
    )


def measured_work(point: dict[str, Any]) -> Workload:
    """Return the workload of a measured point."""
    names = ("samples", "features", "distinct", "dim", "parameters", "flops")
    measured = {name: point[name] for name in names}
    return Workload(**measured, ids=point["features"], state_bytes=4, kernels=1, input_bytes=0, wire_bytes=4)


def check_measured(points: dict[str, Any]) -> list[str]:
    """Return the table that compares measured steps of 1, 2 and 4 ranks with the model."""
    cores = points["constants"]["cores"]
    lines = [
        f"Measured on {points['machine']}; a rank is a process with one thread, connected by Gloo.",
        "",
        "| ids | ranks | measured, ms | model, ms | ratio | memory | exchange | tower | calls | wall time, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points["points"]:
        ranks = point["ranks"]
        found = step(measured_work(point), this_machine(points["constants"], ranks), ranks)
        # Here the all-reduce runs after backward, so nothing hides it.
        total = (
            found.ids + found.rows + found.gradients + found.memory + found.tower + found.all_reduce + found.launches
        )
        exchange = found.ids + found.rows + found.gradients + found.all_reduce
        real = point["step_s"] * max(1.0, ranks / cores)
        parts = " | ".join(f"{1e3 * part:.1f}" for part in (found.memory, exchange, found.tower, found.launches))
        lines.append(
            f"| {point['samples'] * point['features']:,} | {ranks} | {1e3 * real:.1f} | {1e3 * total:.1f} "
            f"| {total / real:.2f} | {parts} | {1e3 * point['step_wall_s']:.1f} |"
        )
    return lines


def check_published() -> list[str]:
    """Return the table that compares published figures with the model."""
    lines = ["| figure | published | model |", "|---|---|---|"]
    record = step(DCNV2, H100, 128)
    lines.append(f"| DLRM-DCNv2, 128 H100, 135,168 samples per step | 2.08 ms | {1e3 * record.serial:.2f} ms |")
    parts = ", ".join(
        f"{name} {1e3 * getattr(record, name):.2f}"
        for name in ("ids", "rows", "gradients", "memory", "tower", "all_reduce", "launches")
    )
    lines.append(f"| its parts, ms | | {parts} (the all-reduce is partly hidden) |")
    for gpus, published in ((8, 25), (128, 51)):
        for each in (512, 1056, 8192):
            share = step(replace(DCNV2, samples=each), H100, gpus).communication
            lines.append(
                f"| embedding communication, {gpus} GPUs, if {each:,} samples per GPU | {published} % | {share:.0%} |"
            )
    return lines


def predictions(name: str, work: Workload, ranks: Sequence[int]) -> list[str]:
    """Return the table of the predicted step on each number of GPUs, with equal work per GPU."""
    lines = [
        f"{name}: {work.samples:,} samples per GPU, {work.ids:g} ids of {work.dim} elements per sample; times in ms",
        "",
        "| GPUs | ids | rows | gradients | memory | tower | all-reduce | launches | (host) | step | with prefetching "
        "| M samples/s | efficiency |",
        "|" + "---|" * 13,
    ]
    base = None
    for gpus in ranks:
        found = step(work, H100, gpus)
        rate = gpus * work.samples / found.seconds
        base = base or found.ahead
        parts = (
            found.ids,
            found.rows,
            found.gradients,
            found.memory,
            found.tower,
            found.all_reduce,
            found.launches,
            found.host,
            found.serial,
            found.ahead,
        )
        lines.append(
            f"| {gpus:,} | {' | '.join(f'{1e3 * part:.2f}' for part in parts)} | {rate / 1e6:.1f} "
            f"| {base / found.ahead:.0%} |"
        )
    return lines


def sensitivity() -> list[str]:
    """Return the table of the click model's step on 128 GPUs with each constant halved and doubled."""
    lines = ["| constant | halved | as assumed | doubled |", "|---|---|---|---|"]
    now = step(CLICKS, H100, 128).ahead
    for name in ("memory", "flops", "in_host", "between", "collective_s", "peer_s", "launch_s"):
        steps = [step(CLICKS, replace(H100, **{name: factor * getattr(H100, name)}), 128).ahead for factor in (0.5, 2)]
        lines.append(f"| `{name}` | {1e3 * steps[0]:.2f} ms | {1e3 * now:.2f} ms | {1e3 * steps[1]:.2f} ms |")
    share = replace(CLICKS, distinct=CLICKS.distinct / 2), replace(CLICKS, distinct=2 * CLICKS.distinct)
    low, high = (step(work, H100, 128).ahead for work in share)
    lines.append(f"| share of distinct ids | {1e3 * low:.2f} ms | {1e3 * now:.2f} ms | {1e3 * high:.2f} ms |")
    return lines


def tables(points: dict[str, Any]) -> Iterable[tuple[str, list[str]]]:
    yield "measured", check_measured(points)
    yield "published", check_published()
    yield "clicks", predictions("Click model, rows exchanged once", CLICKS, RANKS)
    yield "dcnv2", predictions("DLRM-DCNv2, bags pooled by owners", DCNV2, RANKS)
    yield "dcnv2-rows", predictions("DLRM-DCNv2, rows exchanged once", replace(DCNV2, pooled=False), RANKS)
    yield "sensitivity", sensitivity()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=POINTS, help="output of benchmarks.scaling_points")
    parser.add_argument("--table", default="", help="only tables whose name contains this")
    parser.add_argument("--quick", action="store_true", help="no effect; for symmetry with the other benchmarks")
    args = parser.parse_args()
    for name, lines in tables(json.loads(args.points.read_text())):
        if args.table in name:
            print(f"### {name}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
