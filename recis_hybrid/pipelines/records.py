"""Recorder: what the lines of the log say."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid.embedding import EmbeddingEngine, HashTable, Rows
from recis_hybrid.pipelines.callback import ranks

if TYPE_CHECKING:
    from recis_hybrid.pipelines.trainer import Trainer


class Recorder:
    """Counts between two lines of the log."""

    def __init__(self) -> None:
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

    def of_step(self, trainer: Trainer, watched: Mapping[str, Tensor], phases: Mapping[str, float]) -> dict[str, Any]:
        """Returns what is said of a training step; waits for the device, and for all ranks.

        Args:
            trainer: Whose step it was.
            watched: One number each.
            phases: Seconds of the step by phase; none if they were not measured.
        """
        now = time.perf_counter()
        steps = max(trainer.steps_done - self._steps, 1)
        tables = {_name(table): len(table) for engine in trainer.engines for table in engine.tables}
        rows = sum(tables.values())
        means = {name: float(value) for name, value in watched.items()}
        sums = {
            "samples": float(trainer.samples),
            "new_samples": float(trainer.samples - self._samples),
            "admitted": float(rows - (self._rows or 0) + self.evicted),
            "evicted": float(self.evicted),
            **{f"rows/{name}": float(count) for name, count in tables.items()},
        }
        means, sums = _over_ranks(means, sums)
        seconds = max(now - self._last, 1e-9)
        record: dict[str, Any] = {**means, "samples": int(sums.pop("samples")), "seconds": now - self._begin}
        record["samples_per_s"] = sums.pop("new_samples") / seconds
        record["time/data"] = self.waited / steps
        record |= {f"time/{name}": phases[name] for name in ("features", "lookup", "exchange", "towers", "update")
                   if name in phases}  # fmt: skip
        record |= {name: int(count) for name, count in sums.items()}
        record |= _rates(trainer)
        record |= _memory(trainer.engines)
        self._last, self.waited, self.evicted = time.perf_counter(), 0.0, 0
        self._steps, self._samples, self._rows = trainer.steps_done, trainer.samples, rows
        return record

    def frequencies(self, engines: Sequence[EmbeddingEngine]) -> dict[str, Any]:
        """Returns by member table how many rows it has, and how many of these were met 2**k to 2**(k+1) - 1 times.

        Over all ranks. The last entry of ``frequency`` is of the greatest k that occurs.
        """
        found = [
            each for engine in engines for table in engine.tables if not table.read_only for each in _counts(table)
        ]
        if not found:
            return {}
        counts = summed(torch.stack([counts for _, counts in found]))
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
    """Returns each member table's name, and how many of its rows were met 2**k to 2**(k+1) - 1 times, int64 [64]."""
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
        if isinstance(part, torch.optim.Optimizer)
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


def _over_ranks(means: dict[str, float], sums: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Averages some figures over all ranks and adds others up."""
    found = summed(torch.tensor([*means.values(), *sums.values()], dtype=torch.float64)).tolist()
    return (
        {name: value / ranks() for name, value in zip(means, found, strict=False)},
        dict(zip(sums, found[len(means) :], strict=True)),
    )


def summed(values: Tensor) -> Tensor:
    """Returns the sum of a tensor over all ranks."""
    if ranks() == 1:
        return values
    total = values.to("cpu" if "gloo" in dist.get_backend() else "cuda", copy=True)
    dist.all_reduce(total)
    return total.cpu()
