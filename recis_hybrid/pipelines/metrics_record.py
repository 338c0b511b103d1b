"""Recorder: what the lines of the log say."""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recis_hybrid import distributed
from recis_hybrid.embedding import EmbeddingEngine, HashTable, Rows
from recis_hybrid.metrics import Metric

if TYPE_CHECKING:
    from recis_hybrid.pipelines.trainer import Trainer


RESERVED = (
    "event",
    "step",
    "name",
    "loss",
    "weight",
    "grad_norm",
    "samples",
    "samples_per_s",
    "seconds",
    "admitted",
    "evicted",
    "tables",
)
"""Names that the log itself uses in the lines of training steps."""
_RESERVED_PREFIXES = ("loss/", "weight/", "time/", "rows/", "lr/", "memory/")


def is_reserved(name: str) -> bool:
    """Return whether the log itself uses a name in the lines of training steps."""
    return name in RESERVED or name.startswith(_RESERVED_PREFIXES)


class RunningMeans:
    """Means of the figures of steps since the last line of the log, over the rows of all ranks.

    Sums are kept on the figures' devices, in float64, so that adding waits for nothing.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._metrics: dict[str, Metric] = {}
        self._before: dict[str, Mapping[str, Tensor]] = {}
        """States of metrics from a checkpoint, until the metrics first occur."""

    def add(self, figures: Mapping[str, Tensor | Metric], rows: int) -> None:
        """Add the figures of a step, one number each, and registers metrics.

        Args:
            figures: By name.
            rows: Of this rank in the step, by which they count. Without one, as where only other ranks have data left,
                they do not.
        """
        for name, value in figures.items():
            if isinstance(value, Metric):
                self._metrics[name] = value
                if name in self._before:
                    before = copy.copy(value)
                    before.reset()
                    before.load_state_dict(self._before.pop(name))
                    value.merge(before)
            elif rows == 0:
                continue
            elif name in self._sums:
                # Sums of a checkpoint are on the CPU.
                total = self._sums[name] = self._sums[name].to(value.device)
                total.add_(value.detach(), alpha=rows)
                self._counts[name] += rows
            else:
                self._sums[name], self._counts[name] = value.detach().to(torch.float64) * rows, rows

    def take(self) -> dict[str, float]:
        """Return the means and the values of metrics, and resets; synchronises the device and the ranks.

        Raises:
            ValueError: Ranks have other metrics.
        """
        mine = {name: (float(total), self._counts[name]) for name, total in self._sums.items()}
        found = distributed.exchange([mine, sorted(self._metrics)])
        if any(metrics != found[0][1] for _, metrics in found):
            raise ValueError(
                f"Trainer: the steps of all ranks must have the same metrics, which are computed together, got "
                f"{[metrics for _, metrics in found]} by rank"
            )
        totals: dict[str, tuple[float, int]] = {}
        for sums, _ in found:
            for name, (total, count) in sums.items():
                before, counted = totals.get(name, (0.0, 0))
                totals[name] = before + total, counted + count
        values = {name: float(self._metrics[name].compute()) for name in sorted(self._metrics)}
        self.clear()
        return {name: total / count for name, (total, count) in totals.items()} | values

    def clear(self) -> None:
        """Reset the sums and the metrics."""
        for metric in self._metrics.values():
            metric.reset()
        self._sums, self._counts, self._metrics, self._before = {}, {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's sums, and the states of metrics."""
        return {
            "sums": {name: total.cpu() for name, total in self._sums.items()},
            "counts": dict(self._counts),
            "metrics": {name: metric.state_dict() for name, metric in self._metrics.items()} | self._before,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a :meth:`state_dict`; metrics follow when steps first return them."""
        self.clear()
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._before = dict(state["metrics"])


class Recorder:
    """Counts between two lines of the log."""

    def __init__(self) -> None:
        self.means = RunningMeans()
        self.waited = 0.0
        """Seconds that the loop has waited for batches."""
        self.evicted = 0
        """Rows given up."""
        self._begin = self._last = time.perf_counter()
        self._steps = self._samples = 0
        self._rows: int | None = None

    def restart(self, samples: int) -> None:
        """Leaves out of rates what was done since the last line, as an evaluation."""
        self._last, self.waited, self._samples = time.perf_counter(), 0.0, samples

    def of_step(self, trainer: Trainer, phases: Mapping[str, float]) -> dict[str, Any]:
        """Return the figures of the steps since the last line; synchronises the device and the ranks.

        Args:
            trainer: Whose steps they were.
            phases: Seconds of the last step by phase; none if they were not measured.
        """
        now = time.perf_counter()
        steps = max(trainer.steps_done - self._steps, 1)
        tables = {_name(table): len(table) for engine in trainer.engines for table in engine.tables}
        rows = sum(tables.values())
        means = self.means.take()
        sums = {
            "samples": float(trainer.samples),
            "new_samples": float(trainer.samples - self._samples),
            "admitted": float(rows - (self._rows or 0) + self.evicted),
            "evicted": float(self.evicted),
            **{f"rows/{name}": float(count) for name, count in tables.items()},
        }
        sums = dict(
            zip(
                sums,
                distributed.sum_over_ranks(torch.tensor([*sums.values()], dtype=torch.float64)).tolist(),
                strict=True,
            )
        )
        seconds = max(now - self._last, 1e-9)
        record: dict[str, Any] = {**means, "samples": int(sums.pop("samples")), "seconds": now - self._begin}
        record["samples_per_s"] = sums.pop("new_samples") / seconds
        record["time/data"] = self.waited / steps
        record |= {
            f"time/{name}": phases[name]
            for name in ("features", "lookup", "exchange", "towers", "update")
            if name in phases
        }
        record |= {name: int(count) for name, count in sums.items()}
        record |= _rates(trainer)
        record |= _memory(trainer.engines)
        self._last, self.waited, self.evicted = time.perf_counter(), 0.0, 0
        self._steps, self._samples, self._rows = trainer.steps_done, trainer.samples, rows
        return record

    def frequencies(self, engines: Sequence[EmbeddingEngine]) -> dict[str, Any]:
        """Return by member table how many rows it has, and how many of these were met 2**k to 2**(k+1) - 1 times.

        Over all ranks. The last entry of ``frequency`` is of the greatest k that occurs.
        """
        found = [
            each for engine in engines for table in engine.tables if not table.read_only for each in _counts(table)
        ]
        if not found:
            return {}
        counts = distributed.sum_over_ranks(torch.stack([counts for _, counts in found]))
        result = {}
        for (name, _), row in zip(found, counts.tolist(), strict=True):
            levels = max((level for level, count in enumerate(row) if count), default=-1) + 1
            result[name] = {"rows": sum(row), "frequency": row[:levels]}
        return result


@dataclass(eq=False)
class _Look:
    """A rule of eviction that gives nothing up, and sees all rows."""

    seen: Rows | None = None

    def unwanted(self, rows: Rows) -> Tensor:
        self.seen = rows
        return torch.zeros_like(rows.ids, dtype=torch.bool)


def _counts(table: HashTable) -> list[tuple[str, Tensor]]:
    """Return each member table's name, and how many of its rows were met 2**k to 2**(k+1) - 1 times, int64 [64]."""
    look = _Look()
    table.evict(look)
    assert look.seen is not None
    levels = look.seen.frequency.clamp(min=1).double().log2().floor().long()
    return [
        (member.name, torch.bincount(levels[look.seen.members == number], minlength=64).cpu())
        for number, member in enumerate(table.members)
    ]


def _name(table: HashTable) -> str:
    names = [member.name for member in table.members]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _rates(trainer: Trainer) -> dict[str, float]:
    parts = trainer.parts()
    return {
        f"lr/{name}": float(part.param_groups[0]["lr"])
        for name, part in parts.items()
        # An optimizer may have its rate elsewhere, as one of optax has.
        if isinstance(part, torch.optim.Optimizer) and "lr" in part.param_groups[0]
    }


def _memory(engines: Sequence[EmbeddingEngine]) -> dict[str, int]:
    result = {"memory/tables": sum(engine.memory()["total"] for engine in engines)}
    statm = Path("/proc/self/statm")
    if statm.exists():
        result["memory/process"] = int(statm.read_text().split()[1]) * resource.getpagesize()
    else:  # the greatest so far; in bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result["memory/process"] = peak if sys.platform == "darwin" else peak * 1024
    if torch.cuda.is_initialized():
        result["memory/cuda"] = torch.cuda.memory_allocated()
    return result
