"""Accumulators: torchmetrics' interface (update, compute, reset), mergeable, and over all ranks.

Letters: B rows of one update, N rows in all, K sums.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid.distributed import sum_over_ranks, world_size
from recis_hybrid.metrics._checks import check_shapes
from recis_hybrid.metrics._ranks import gather_rows
from recis_hybrid.validation import check_flag

Self = TypeVar("Self", bound="Metric")


# Evaluation loops run in inference mode; a tensor that is made in it could not be changed after them.
_outside_inference = torch.inference_mode(False)


class Metric(ABC):
    """What all accumulators share.

    ``update`` waits for no device, and works in and outside of ``torch.inference_mode()``. Where torch.distributed is
    initialised, ``compute`` is a collective: every rank of the group calls it, and all get the value of what all have
    seen.

    Args:
        process_group: The ranks that evaluate together; None: torch.distributed's default group.
        sync: False computes the value of what this rank alone has seen.
    """

    takes_groups: ClassVar[bool] = False
    """Whether ``update`` takes, after the labels, the group that each row belongs to."""

    def __init__(self, *, process_group: dist.ProcessGroup | None = None, sync: bool = True) -> None:
        check_flag(type(self).__name__, "sync", sync)
        self._process_group = process_group
        self._sync = sync

    @abstractmethod
    def compute(self) -> float:
        """Return the value of everything seen since the last reset, by all ranks."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def merge(self: Self, other: Self) -> None:
        """Add everything that another accumulator of the same kind has seen."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return what this rank has accumulated since the last reset, as tensors on the CPU."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace what has been accumulated by the :meth:`state_dict` of a metric of the same kind."""

    def __repr__(self) -> str:
        shown = {**self._settings(), **self._progress()}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def _settings(self) -> dict[str, object]:
        """Return the arguments to show in the repr."""
        return {}

    def _progress(self) -> dict[str, object]:
        """Return what has been accumulated, to show in the repr: cheap to compute, and no collective."""
        return {}

    def _alone(self) -> bool:
        return not self._sync or world_size(self._process_group) == 1

    def _nothing(self) -> ValueError:
        return ValueError(f"{type(self).__name__}: nothing to compute; call update first")


class SumMetric(Metric):
    """A metric that is a function of sums over rows: memory does not grow, and ranks add theirs up."""

    def __init__(self, *, process_group: dist.ProcessGroup | None = None, sync: bool = True) -> None:
        super().__init__(process_group=process_group, sync=sync)
        self._sums: Tensor | None = None

    @_outside_inference
    def update(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch without waiting for a device.

        Args:
            scores: ``[B]``, floating.
            labels: ``[B]``, any dtype.
            weights: ``[B]``, how much each row counts; None counts each once.
        """
        check_shapes(type(self).__name__, labels, scores, weights=weights)
        scores, labels = scores.detach().double(), labels.detach().double()
        weights = torch.ones_like(scores) if weights is None else weights.detach().double()
        terms = self._terms(scores, labels, weights)
        self._sums = terms if self._sums is None else self._sums.add_(terms.to(self._sums.device))

    def compute(self) -> float:
        """Return the value of everything seen since the last reset, by all ranks."""
        return self._value(self._total())

    def _total(self) -> Tensor:
        sums = None if self._sums is None else self._sums.cpu()
        if not self._alone():
            # A rank without rows takes part as well. All ranks send from the CPU: one without rows has no other device,
            # and a group with backends for CPU and CUDA would not match the two.
            sums = sum_over_ranks(self._zeros() if sums is None else sums, self._process_group)
        if sums is None:
            raise self._nothing()
        return sums

    @_outside_inference
    def merge(self: SumSelf, other: SumSelf) -> None:
        """Add everything that another accumulator of the same kind has seen."""
        if other._sums is not None:
            self._sums = other._sums.clone() if self._sums is None else self._sums.add_(other._sums.to(self._sums))

    def reset(self) -> None:
        """Forgets everything."""
        self._sums = None

    @_outside_inference
    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's ``sums``, float64 ``[K]`` on the CPU."""
        return {"sums": (self._zeros() if self._sums is None else self._sums).cpu().clone()}

    @_outside_inference
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the sums by those of a :meth:`state_dict`."""
        self._sums = state_dict["sums"].clone()

    def _progress(self) -> dict[str, object]:
        # The value of this rank alone would mislead, and sums on a GPU would have to be waited for.
        if self._sums is None or not self._sums.is_cpu or not self._alone():
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # undefined as yet
            try:
                return {"value": f"{self._value(self._sums):.6g}"}
            except ValueError:  # bad rows, which compute() reports
                return {}

    def _zeros(self) -> Tensor:
        none = torch.zeros(0, dtype=torch.float64)
        return torch.zeros_like(self._terms(none, none, none))

    @abstractmethod
    def _terms(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the sums over rows, float64 [K]; all arguments are float64 [B]."""

    @abstractmethod
    def _value(self, sums: Tensor) -> float:
        """Return the metric of sums over all rows, float64 [K] on the CPU."""


SumSelf = TypeVar("SumSelf", bound=SumMetric)

_DTYPES = {"groups": torch.int64, "labels": torch.float64, "scores": torch.float64, "weights": torch.float64}


class RowMetric(Metric):
    """A metric that needs all rows together, and keeps them: 24 bytes a row, 32 with groups, at the most."""

    def __init__(self, *, process_group: dist.ProcessGroup | None = None, sync: bool = True) -> None:
        super().__init__(process_group=process_group, sync=sync)
        self._rows: list[dict[str, Tensor | None]] = []

    @_outside_inference
    def _add(self, scores: Tensor, labels: Tensor, **others: Tensor | None) -> None:
        check_shapes(type(self).__name__, labels, scores, **others)
        # Copies: the caller may use its buffers again, and a slice of a reader's buffer would hold all of it in memory.
        rows = {"labels": labels, "scores": scores, **others}
        self._rows.append({name: None if rows[name] is None else rows[name].detach().clone() for name in rows})  # type: ignore[union-attr]

    def seen(self) -> dict[str, Tensor]:
        """Return all rows that all ranks have seen, ``[N]`` each.

        Raises:
            ValueError: If there is none.
        """
        rows = self.state_dict()
        if not self._alone():
            rows = gather_rows(rows, self._process_group)
        if rows["labels"].numel() == 0:
            raise self._nothing()
        return rows

    def merge(self: RowSelf, other: RowSelf) -> None:
        """Add everything that another accumulator of the same kind has seen."""
        self._rows.extend(other._rows)

    def reset(self) -> None:
        """Forgets everything."""
        self._rows = []

    @_outside_inference
    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's ``labels``, ``scores``, ``weights`` (and ``groups``), ``[N]`` each, on the CPU."""
        names = [*(["groups"] if self.takes_groups else []), "labels", "scores", "weights"]
        return {name: self._column(name).to(_DTYPES[name]) for name in names}

    @_outside_inference
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the rows by those of a :meth:`state_dict`."""
        self._rows = [dict(state_dict)] if state_dict["labels"].numel() else []

    def _progress(self) -> dict[str, object]:
        return {"rows": sum(rows["labels"].numel() for rows in self._rows if rows["labels"] is not None)}

    def _column(self, name: str) -> Tensor:
        if not self._rows:
            return torch.empty(0, dtype=_DTYPES[name])
        parts = []
        for rows in self._rows:
            labels, values = rows["labels"], rows.get(name)
            assert labels is not None
            # A batch whose rows all weigh 1 keeps no weights.
            parts.append(torch.ones(labels.numel(), device=labels.device) if values is None else values)
        return torch.cat([part.to(parts[0].device) for part in parts]).cpu()


RowSelf = TypeVar("RowSelf", bound=RowMetric)


class ScoredLabels(RowMetric):
    """Keeps every (score, label, weight)."""

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch without waiting for a device.

        Args:
            scores: ``[B]``, floating.
            labels: ``[B]``, 0 or 1, any dtype.
            weights: ``[B]``, how much each row counts; None counts each once.
        """
        self._add(scores, labels, weights=weights)


class GroupedLabels(RowMetric):
    """Keeps every (score, label, group, weight)."""

    takes_groups = True

    def update(self, scores: Tensor, labels: Tensor, groups: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch without waiting for a device. The rows of a group may come in any batches, on any ranks.

        Args:
            scores: ``[B]``, floating.
            labels: ``[B]``, any dtype.
            groups: int64 ``[B]``, to which user, session or query each row belongs.
            weights: ``[B]``, how much each row counts; None counts each once.

        Raises:
            ValueError: If shapes differ, or groups are no integers.
        """
        if groups.is_floating_point() or groups.is_complex():
            raise ValueError(f"{type(self).__name__}: groups must be integers, got {groups.dtype}; hash or round them")
        self._add(scores, labels, groups=groups, weights=weights)
