"""Base classes of metrics with torchmetrics' ``update``, ``compute`` and ``reset``; mergeable, and over all ranks.

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
from recis_hybrid.metrics._checks import check_shapes, on_host
from recis_hybrid.metrics._ranks import gather_rows
from recis_hybrid.validation import check_flag

Self = TypeVar("Self", bound="Metric")


# Evaluation loops run in inference mode, but tensors created in it cannot be modified outside.
_outside_inference = torch.inference_mode(False)


class Metric(ABC):
    """Base class of metrics.

    ``update`` does not synchronize the device and works inside and outside ``torch.inference_mode()``. If
    torch.distributed is initialized, ``compute`` is collective: all ranks of the group call it and get the value over
    the rows of all ranks.

    Args:
        process_group: Ranks that evaluate together; None for the default group.
        sync: Whether ``compute`` covers all ranks or only this one.
    """

    takes_groups: ClassVar[bool] = False
    """True if ``update`` takes the groups of the rows after the labels."""

    def __init__(self, *, process_group: dist.ProcessGroup | None = None, sync: bool = True) -> None:
        check_flag(type(self).__name__, "sync", sync)
        self._process_group = process_group
        self._sync = sync

    @abstractmethod
    def compute(self) -> float:
        """Return the value over all rows since the last reset, on all ranks."""

    @abstractmethod
    def reset(self) -> None:
        """Discard the accumulated state."""

    @abstractmethod
    def merge(self: Self, other: Self) -> None:
        """Add the accumulated state of another metric of the same kind."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that this rank has accumulated since the last reset, as CPU tensors."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the accumulated state with the :meth:`state_dict` of a metric of the same kind."""

    def __repr__(self) -> str:
        shown = {**self._settings(), **self._progress()}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def _settings(self) -> dict[str, object]:
        """Return the arguments to show in the repr."""
        return {}

    def _progress(self) -> dict[str, object]:
        """Return the accumulated state to show in the repr. Must be cheap and not collective."""
        return {}

    def _is_local(self) -> bool:
        return not self._sync or world_size(self._process_group) == 1

    def _no_rows(self) -> ValueError:
        return ValueError(f"{type(self).__name__}: nothing to compute; call update first")


class SumMetric(Metric):
    """Base class of metrics that are functions of sums over rows. Memory is constant, and ranks add their sums."""

    def __init__(self, *, process_group: dist.ProcessGroup | None = None, sync: bool = True) -> None:
        super().__init__(process_group=process_group, sync=sync)
        self._sums: Tensor | None = None

    @_outside_inference
    def update(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch without synchronizing the device.

        Args:
            scores: ``[B]``, floating.
            labels: ``[B]``, any dtype.
            weights: ``[B]``, the weight of each row; None means 1 for all rows.
        """
        check_shapes(type(self).__name__, labels, scores, weights=weights)
        scores, labels = scores.detach().double(), labels.detach().double()
        weights = torch.ones_like(scores) if weights is None else weights.detach().double()
        terms = self._terms(scores, labels, weights)
        self._sums = terms if self._sums is None else self._sums.add_(terms.to(self._sums.device))

    def compute(self) -> float:
        """Return the value over all rows since the last reset, on all ranks."""
        return self._value(self._total())

    def _total(self) -> Tensor:
        sums = None if self._sums is None else self._sums.cpu()
        if not self._is_local():
            # A rank without rows takes part too. All ranks send from the CPU, because a rank without rows knows no
            # other device, and a group with CPU and CUDA backends does not match collectives across the two.
            sums = sum_over_ranks(self._zeros() if sums is None else sums, self._process_group)
        if sums is None:
            raise self._no_rows()
        return sums

    @_outside_inference
    def merge(self: SumSelf, other: SumSelf) -> None:
        """Add the accumulated state of another metric of the same kind."""
        if other._sums is not None:
            self._sums = other._sums.clone() if self._sums is None else self._sums.add_(other._sums.to(self._sums))

    def reset(self) -> None:
        """Discard the accumulated state."""
        self._sums = None

    @_outside_inference
    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's ``sums``, float64 ``[K]`` on the CPU."""
        return {"sums": (self._zeros() if self._sums is None else self._sums).cpu().clone()}

    @_outside_inference
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the sums with those of a :meth:`state_dict`."""
        self._sums = state_dict["sums"].clone()

    def _progress(self) -> dict[str, object]:
        # The value of one of several ranks would mislead, and reading sums on a GPU would synchronize.
        if self._sums is None or not self._sums.is_cpu or not self._is_local():
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the value may not be defined yet
            try:
                return {"value": f"{self._value(self._sums):.6g}"}
            except ValueError:  # invalid rows, which compute() reports
                return {}

    def _zeros(self) -> Tensor:
        empty = torch.zeros(0, dtype=torch.float64)
        return torch.zeros_like(self._terms(empty, empty, empty))

    @abstractmethod
    def _terms(self, scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the sums over rows, float64 ``[K]``; all arguments are float64 ``[B]``."""

    @abstractmethod
    def _value(self, sums: Tensor) -> float:
        """Return the value of the metric from the sums over all rows, float64 ``[K]`` on the CPU."""


SumSelf = TypeVar("SumSelf", bound=SumMetric)

_DTYPES = {"groups": torch.int64, "labels": torch.float64, "scores": torch.float64, "weights": torch.float64}


class RowMetric(Metric):
    """Base class of metrics that keep all rows: at most 24 bytes per row, 32 with groups."""

    def __init__(self, *, process_group: dist.ProcessGroup | None = None, sync: bool = True) -> None:
        super().__init__(process_group=process_group, sync=sync)
        self._rows: list[dict[str, Tensor | None]] = []

    @_outside_inference
    def _add(self, scores: Tensor, labels: Tensor, **others: Tensor | None) -> None:
        check_shapes(type(self).__name__, labels, scores, **others)
        # Copy, because the caller may reuse its buffers, and a slice would keep a reader's whole buffer alive.
        rows = {"labels": labels, "scores": scores, **others}
        self._rows.append({name: None if rows[name] is None else rows[name].detach().clone() for name in rows})  # type: ignore[union-attr]

    def seen(self) -> dict[str, Tensor]:
        """Return the rows of all ranks, ``[N]`` each; collective.

        Raises:
            ValueError: If there are no rows.
        """
        rows = self.state_dict()
        if not self._is_local():
            rows = gather_rows(rows, self._process_group)
        if rows["labels"].numel() == 0:
            raise self._no_rows()
        return rows

    def merge(self: RowSelf, other: RowSelf) -> None:
        """Add the accumulated state of another metric of the same kind."""
        self._rows.extend(other._rows)

    def reset(self) -> None:
        """Discard the accumulated state."""
        self._rows = []

    @_outside_inference
    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's ``labels``, ``scores``, ``weights`` (and ``groups``), ``[N]`` each, on the CPU."""
        names = [*(["groups"] if self.takes_groups else []), "labels", "scores", "weights"]
        columns = on_host(*(self._column(name) for name in names))
        return {name: column.to(_DTYPES[name]) for name, column in zip(names, columns, strict=True)}

    @_outside_inference
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Replace the rows with those of a :meth:`state_dict`."""
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
            # Batches without weights have weight 1.
            parts.append(torch.ones(labels.numel(), device=labels.device) if values is None else values)
        return torch.cat([part.to(parts[0].device) for part in parts])


RowSelf = TypeVar("RowSelf", bound=RowMetric)


class ScoredLabels(RowMetric):
    """Base class of metrics that keep the score, label and weight of every row."""

    def update(self, scores: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch without synchronizing the device.

        Args:
            scores: ``[B]``, floating.
            labels: ``[B]``, 0 or 1, any dtype.
            weights: ``[B]``, the weight of each row; None means 1 for all rows.
        """
        self._add(scores, labels, weights=weights)


class GroupedLabels(RowMetric):
    """Base class of metrics that keep the score, label, group and weight of every row."""

    takes_groups = True

    def update(self, scores: Tensor, labels: Tensor, groups: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch without synchronizing the device. Rows of a group may be spread over batches and ranks.

        Args:
            scores: ``[B]``, floating.
            labels: ``[B]``, any dtype.
            groups: int64 ``[B]``, the user, session or query of each row.
            weights: ``[B]``, the weight of each row; None means 1 for all rows.

        Raises:
            ValueError: If shapes differ, or groups are not integers.
        """
        if groups.is_floating_point() or groups.is_complex():
            raise ValueError(f"{type(self).__name__}: groups must be integers, got {groups.dtype}; hash or round them")
        self._add(scores, labels, groups=groups, weights=weights)
