"""The targets for one GPU, measured: a JSON line per case, and a table for ``benchmarks/GPU.md``.

    python -m benchmarks.gpu [--quick] [--cases gather] [--time-limit 300]

Tables have 64 M rows if they fit into memory. ``--quick``, ``--device emulated`` and ``--device cpu`` run the same code
with tiny sizes; figures are only judged for real sizes on a GPU. Each group of cases runs in a process of its own, and
one that fails or hangs leaves the others alone. The exit status is 1 if a case failed; a missed target is no failure.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import torch

from benchmarks import gpu_hybrid, gpu_steps, gpu_tables, harness
from benchmarks.gpu_workload import FULL, TINY, Bench, Measured
from csrc.test.emulated import device as emulated

LARGEST_SHARE = 0.4
"""Share of the time limit that one group may take."""


@dataclass(frozen=True)
class Target:
    """The figure that a case must reach, and the one that it aims at."""

    case: str
    unit: str
    must: float
    aim: float
    peer: float | None
    """Figure of the reference, in the same unit."""
    peer_name: str
    lower: bool = False
    """True if lower figures are better."""

    def verdict(self, value: float) -> str:
        """Return "aim", "must" or "missed"."""
        for name, bound in (("aim", self.aim), ("must", self.must)):
            if value <= bound if self.lower else value >= bound:
                return name
        return "missed"

    def line(self, value: float | None, verdict: str, device: str = "", detail: str = "") -> Line:
        """Return the line for a figure, or for none."""
        ratio = None
        if self.peer is not None and value:
            ratio = float(f"{self.peer / value if self.lower else value / self.peer:.3g}")
        ours = None if value is None else float(f"{value:.4g}")
        metric = "lower" if self.lower else "higher"
        return Line(
            "gpu",
            self.case,
            f"{metric} is better",
            self.unit,
            ours,
            self.peer,
            self.peer_name,
            ratio,
            self.must,
            self.aim,
            verdict,
            device,
            detail,
        )


@dataclass(frozen=True)
class Line(harness.Result):
    """The JSON line of a case; ``ours`` is None if there is no figure, for which ``detail`` has the reason."""

    must: float
    aim: float
    verdict: str
    """aim, must, missed, or: not judged, not run, failed, not yet run."""
    device: str
    detail: str


_KINDS = ("uniform", "zipf")
_FLOOR = (1.0, "bytes that must move, at the bandwidth of a copy")
_HKV = (3.9, "HKV, H100 NVL (arXiv 2603.17168)")
_TBE = (1.35, "FBGEMM TBE, H100; dynamicemb: 2.19")
_ALL = [
    *[Target(f"gather/d{dim}/{kind}", "of the floor", 0.6, 0.85, *_FLOOR) for dim in (64, 128) for kind in _KINDS],
    *[Target(f"find/{load:g}/{kind}", "G ids/s", 2, 4, *_HKV) for load in gpu_tables.LOADS for kind in _KINDS],
    Target("find_or_insert/half new", "G ids/s", 0.8, 1.5, 1.28, "HKV, A100"),
    *[Target(f"step/{kind}", "ms", 1.3, 0.9, *_TBE, lower=True) for kind in _KINDS],
    Target("step/one id at 1 %", "× step/uniform", 1.3, 1.05, 1, "the step without that id", lower=True),
    Target("host/zipf", "M ids/s", 150, 400, 432, "NVE, GB200"),
    Target("features/eager", "× eager", 10, 30, 1, "eager torch on the same device"),
    Target("launches/100 features", "launches", 20, 12, None, "counted", lower=True),
    Target(gpu_hybrid.TOWER, "× fused JAX", 1.1, 1.03, 1, "the same step in JAX alone", lower=True),
    Target(gpu_hybrid.INSIDE, "× fused JAX", 1.1, 1.03, 1, "the same step in JAX alone", lower=True),
]
TARGETS = {target.case: target for target in _ALL}
GROUPS: dict[str, Callable[[Bench], Iterator[Measured]]] = {
    "gather/d64/": partial(gpu_tables.gather, dim=64),
    "gather/d128/": partial(gpu_tables.gather, dim=128),
    "find": gpu_tables.ids,
    "step/": gpu_steps.steps,
    "host/": gpu_steps.host,
    "features/": gpu_steps.features,
    "launches/": gpu_steps.launches,
    "hybrid/": gpu_hybrid.hybrid,
}
"""Groups of cases that run in one process, by the beginning of the cases' names."""


@dataclass(frozen=True)
class Run:
    """Device and sizes of a run."""

    kind: str
    """cuda, cpu or emulated."""
    tiny: bool
    threads: int = 1
    """CPU threads of torch."""

    def measure(self, group: str) -> Iterator[Measured]:
        """Yield the figures of a group, in this process."""
        if self.kind == "emulated":
            emulated.load()
        yield from GROUPS[group](Bench(self.kind, TINY if self.tiny else FULL))

    def line(self, measured: Measured, device: str) -> Line:
        """Return the line of a figure."""
        target = TARGETS[measured.case]
        if measured.value is None:
            return target.line(None, "not run", device, measured.detail)
        judged = self.kind == "cuda" and not self.tiny
        verdict = target.verdict(measured.value) if judged else "not judged"
        return target.line(measured.value, verdict, device, measured.detail)

    def lines(self, group: str, device: str, seconds: float) -> Iterator[Line]:
        """Yield a line for each case of a group, which is measured in another process within a time limit."""
        missing = [case for case in TARGETS if case.startswith(group)]
        reason = "the group ended without this case"
        for message in measured_apart(self, group, seconds):
            if isinstance(message, str):
                reason = message
            else:
                missing.remove(message.case)
                yield self.line(message, device)
        for case in missing:
            yield TARGETS[case].line(None, "failed", device, reason)


def measured_apart(run: Run, group: str, seconds: float) -> Iterator[Measured | str]:
    """Yield the figures of a group, measured in another process; and the reason if there are no more."""
    end = time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, run, group))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            yield receiver.recv()
        yield f"not done after {seconds:.0f} s"
    except EOFError:
        process.join()
        if process.exitcode:
            yield f"the process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _measure(sender: Connection, run: Run, group: str) -> None:
    torch.set_num_threads(run.threads)
    try:
        for measured in run.measure(group):
            sender.send(measured)
    except Exception as error:
        traceback.print_exc()
        sender.send(f"{type(error).__name__}: {error}".splitlines()[0])


def describe(kind: str) -> str:
    """Return the name of a device."""
    if kind != "cuda":
        return kind
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB"


def markdown(lines: Iterable[Line]) -> str:
    """Return the lines as a table; targets without a line are "not yet run"."""
    by_case = {line.case: line for line in lines}
    rows = [
        "| case | unit | reference | must | aim | measured | verdict | detail |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, target in TARGETS.items():
        line = by_case.get(case) or target.line(None, "not yet run")
        reference = target.peer_name if target.peer is None else f"{target.peer:g}: {target.peer_name}"
        measured = "" if line.ours is None else f"{line.ours:g}"
        cells = (case, target.unit, reference, f"{target.must:g}", f"{target.aim:g}", measured, line.verdict)
        rows.append(f"| {' | '.join((*cells, line.detail.replace('|', '/')))} |")
    return "\n".join(rows)


def main() -> int:
    parser = harness.parser(__doc__ or "", devices=("cuda", "cpu", "emulated"))
    parser.add_argument("--time-limit", type=float, default=300, help="seconds for all cases")
    args = parser.parse_args()
    if args.device == "emulated" and (reason := emulated.reason_to_skip()):
        parser.error(reason)
    wanted = [case for case in TARGETS if args.cases in case]
    if args.device == "cuda" and not torch.cuda.is_available():
        harness.progress(f"torch {torch.__version__} sees no CUDA device; no case was run")
        lines = [TARGETS[case].line(None, "not yet run") for case in wanted]
        for line in lines:
            line.print()
    else:
        run = Run(args.device, args.quick or args.device != "cuda", args.threads)
        lines = list(measure(run, wanted, args.time_limit))
    harness.progress(markdown(lines))
    return int(any(line.verdict == "failed" for line in lines))


def measure(run: Run, wanted: list[str], seconds: float) -> Iterator[Line]:
    """Measure cases, and print and yield their lines; a group takes at most ``LARGEST_SHARE`` of the seconds."""
    device, end = describe(run.kind), time.monotonic() + seconds
    for group in GROUPS:
        if not any(case.startswith(group) for case in wanted):
            continue
        harness.progress(f"{group} on {device}")
        left = max(min(LARGEST_SHARE * seconds, end - time.monotonic()), 0)
        for line in run.lines(group, device, left):
            if line.case in wanted:
                line.print()
                yield line


if __name__ == "__main__":
    sys.exit(main())
