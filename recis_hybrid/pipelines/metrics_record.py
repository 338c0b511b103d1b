"""Recorder: the figures in the records of the log."""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recis_hybrid import distributed
from recis_hybrid.embedding import EmbeddingEngine, HashTable, MemberStatistics, Rows
from recis_hybrid.metrics import Metric

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
    "hottest",
)
"""Names that the log itself uses in records of training steps."""
_RESERVED_PREFIXES = ("loss/", "weight/", "time/", "rows/", "lr/", "memory/", "cache/", "table/")


def is_reserved(name: str) -> bool:
    """Return whether the log itself uses a name in records of training steps."""
    return name in RESERVED or name.startswith(_RESERVED_PREFIXES)


class RunningMeans:
    """Means of the steps' figures since the last record of the log, over the rows of all ranks.

    Sums are float64 and stay on the figures' devices, so adding to them does not synchronize.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._metrics: dict[str, Metric] = {}
        self._saved_metrics: dict[str, Mapping[str, Tensor]] = {}
        """States of metrics from a checkpoint, kept until a step first returns the metrics."""

    def add(self, figures: Mapping[str, Tensor | Metric], rows: int) -> None:
        """Add the figures of a step and register its metrics.

        Args:
            figures: Metrics, or tensors of one number, by name.
            rows: Number of rows of this rank in the step, which weighs the figures. With 0 rows, if only other ranks
                have data left, the figures do not count.
        """
        for name, value in figures.items():
            if isinstance(value, Metric):
                self._metrics[name] = value
                if name in self._saved_metrics:
                    saved = copy.copy(value)
                    saved.reset()
                    saved.load_state_dict(self._saved_metrics.pop(name))
                    value.merge(saved)
            elif rows == 0:
                continue
            elif name in self._sums:
                # Sums from a checkpoint are on the CPU.
                total = self._sums[name] = self._sums[name].to(value.device)
                total.add_(value.detach(), alpha=rows)
                self._counts[name] += rows
            else:
                self._sums[name], self._counts[name] = value.detach().to(torch.float64) * rows, rows

    def take(self) -> dict[str, float]:
        """Return the means and the values of metrics, and reset both; synchronizes the device and the ranks.

        Raises:
            ValueError: The ranks have different metrics.
        """
        own = {name: (float(total), self._counts[name]) for name, total in self._sums.items()}
        by_rank = distributed.exchange([own, sorted(self._metrics)])
        if any(metrics != by_rank[0][1] for _, metrics in by_rank):
            raise ValueError(
                f"Trainer: the steps of all ranks must have the same metrics, because ranks compute them together, got "
                f"{[metrics for _, metrics in by_rank]} by rank"
            )
        totals: dict[str, tuple[float, int]] = {}
        for sums, _ in by_rank:
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
        self._sums, self._counts, self._metrics, self._saved_metrics = {}, {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's sums and the states of its metrics."""
        return {
            "sums": {name: total.cpu() for name, total in self._sums.items()},
            "counts": dict(self._counts),
            "metrics": {name: metric.state_dict() for name, metric in self._metrics.items()} | self._saved_metrics,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state_dict`. The state of a metric is restored when a step first returns the metric."""
        self.clear()
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._saved_metrics = dict(state["metrics"])


class Recorder:
    """Collects figures between two records of the log."""

    def __init__(self) -> None:
        self.means = RunningMeans()
        self.wait_seconds = 0.0
        """Time that the loop has waited for batches, since the last record."""
        self.evicted = 0
        """Rows evicted since the last record."""
        self._start = self._last = time.perf_counter()
        self._steps = self._samples = 0
        self._rows: int | None = None
        self._cache = (0, 0)
        """Hits and misses of the caches until the last record."""
        self._counted: dict[str, MemberStatistics] = {}
        """Statistics of the member tables in the last record."""

    def restart(self, samples: int) -> None:
        """Exclude the time since the last record, such as an evaluation, from rates."""
        self._last, self.wait_seconds, self._samples = time.perf_counter(), 0.0, samples

    def train_record(
        self,
        *,
        steps: int,
        samples: int,
        engines: Sequence[EmbeddingEngine],
        parts: Mapping[str, object],
        phases: Mapping[str, float],
    ) -> dict[str, Any]:
        """Return the figures of the steps since the last record; synchronizes the device and the ranks.

        Args:
            steps: Steps of the training.
            samples: Samples of the training, on this rank.
            engines: Engines whose table rows are counted.
            parts: Parts of a checkpoint; the learning rates are those of the optimizers among them.
            phases: Seconds of the last step by phase; empty if not measured.
        """
        now = time.perf_counter()
        new_steps = max(steps - self._steps, 1)
        tables = {_name(table): len(table) for engine in engines for table in engine.tables}
        rows = sum(tables.values())
        means = self.means.take()
        uses = [use for engine in engines for table in engine.tables if (use := table.cache_statistics()) is not None]
        cache = (sum(use.hits for use in uses), sum(use.misses for use in uses))
        tracking = [engine for engine in engines if any(table.tracker is not None for table in engine.tables)]
        # Counters restart when a table is cleared.
        before = self._cache if cache >= self._cache else (0, 0)
        sums = {
            "samples": float(samples),
            "new_samples": float(samples - self._samples),
            "admitted": float(rows - (self._rows or 0) + self.evicted),
            "evicted": float(self.evicted),
            "hits": float(cache[0] - before[0]),
            "misses": float(cache[1] - before[1]),
            "tracking": float(len(tracking)),
            **{f"rows/{name}": float(count) for name, count in tables.items()},
        }
        totals = distributed.sum_over_ranks(torch.tensor([*sums.values()], dtype=torch.float64))
        sums = dict(zip(sums, totals.tolist(), strict=True))
        if sums.pop("tracking") != len(tracking) * distributed.world_size():
            raise RuntimeError("Trainer: all ranks must track the ids of the same engines; call engine.track on all")
        seconds = max(now - self._last, 1e-9)
        record: dict[str, Any] = {**means, "samples": int(sums.pop("samples")), "seconds": now - self._start}
        record["samples_per_s"] = sums.pop("new_samples") / seconds
        record["time/data"] = self.wait_seconds / new_steps
        record |= {
            f"time/{name}": phases[name]
            for name in ("features", "lookup", "exchange", "towers", "update")
            if name in phases
        }
        hits, misses = sums.pop("hits"), sums.pop("misses")
        if uses:
            record["cache/hit_rate"] = hits / max(hits + misses, 1.0)
        record |= {name: int(count) for name, count in sums.items()}
        record |= self._tables(tracking)
        record |= _learning_rates(parts)
        record |= _memory(engines)
        self._last, self.wait_seconds, self.evicted = time.perf_counter(), 0.0, 0
        self._steps, self._samples, self._rows, self._cache = steps, samples, rows, cache
        return record

    def _tables(self, tracking: Sequence[EmbeddingEngine]) -> dict[str, Any]:
        """Return the figures of the member tables of engines that track ids, since the last record; collective."""
        record: dict[str, Any] = {}
        hottest: dict[str, list[list[int]]] = {}
        for logical in (table for engine in tracking for table in engine.stats()):
            for name, now in logical.members.items():
                before = self._counted.get(name, MemberStatistics(rows=0, ids=0, new_rows=0, rejected_ids=0))
                if (before.ids or 0) > (now.ids or 0):  # counts restart when `track` is called again
                    before = MemberStatistics(rows=0, ids=0, new_rows=0, rejected_ids=0)
                self._counted[name] = now
                counts = {
                    each: (getattr(now, each) or 0) - (getattr(before, each) or 0)
                    for each in ("ids", "new_rows", "rejected_ids", "evicted_rows")
                }
                figures = {"rows": now.rows, **counts, "load": logical.load}
                if counts["ids"]:
                    figures["hit_rate"] = 1 - (counts["new_rows"] + counts["rejected_ids"]) / counts["ids"]
                record |= {f"table/{name}/{figure}": value for figure, value in figures.items()}
                if now.hottest:
                    hottest[name] = [list(each) for each in now.hottest]
        return record | ({"hottest": hottest} if hottest else {})


def frequencies(engines: Sequence[EmbeddingEngine]) -> dict[str, Any]:
    """Return the number of rows of each member table, and how many were seen 2**k to 2**(k+1) - 1 times; collective.

    Counts cover all ranks. The last entry of ``frequency`` belongs to the largest k that occurs.
    """
    counts = [
        each for engine in engines for table in engine.tables if not table.read_only for each in _level_counts(table)
    ]
    if not counts:
        return {}
    totals = distributed.sum_over_ranks(torch.stack([levels for _, levels in counts]))
    result = {}
    for (name, _), row in zip(counts, totals.tolist(), strict=True):
        size = max((level for level, count in enumerate(row) if count), default=-1) + 1
        result[name] = {"rows": sum(row), "frequency": row[:size]}
    return result


def _level_counts(table: HashTable) -> list[tuple[str, Tensor]]:
    """Return for each member table its name and how many rows were seen 2**k to 2**(k+1) - 1 times, int64 [64]."""
    counts: dict[str, Tensor] = {}

    def count(rows: Rows) -> Tensor:
        levels = rows.frequency.clamp(min=1).double().log2().floor().long()
        counts[rows.table] = torch.bincount(levels, minlength=64).cpu()
        return torch.zeros_like(rows.ids, dtype=torch.bool)

    table.evicted_by(count)
    return list(counts.items())


def _name(table: HashTable) -> str:
    names = [member.name for member in table.members]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _learning_rates(parts: Mapping[str, object]) -> dict[str, float]:
    """Return the learning rate of each optimizer, or of each of its groups if there are several."""
    result = {}
    for name, part in parts.items():
        # An optax optimizer has no learning rate in its parameter groups.
        if not isinstance(part, torch.optim.Optimizer) or "lr" not in part.param_groups[0]:
            continue
        several = len(part.param_groups) > 1
        for number, group in enumerate(part.param_groups):
            result[f"lr/{name}/{number}" if several else f"lr/{name}"] = float(group["lr"])
    return result


def _memory(engines: Sequence[EmbeddingEngine]) -> dict[str, int]:
    result = {"memory/tables": sum(engine.memory()["total"] for engine in engines)}
    statm = Path("/proc/self/statm")
    if statm.exists():
        result["memory/process"] = int(statm.read_text().split()[1]) * resource.getpagesize()
    else:  # the peak so far; in bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result["memory/process"] = peak if sys.platform == "darwin" else peak * 1024
    if torch.cuda.is_initialized():
        result["memory/cuda"] = torch.cuda.memory_allocated()
    return result
