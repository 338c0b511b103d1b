"""Reads ids from the columns of a Batch.

Letters: B rows, L ids of a row's bag (or bags of a row, with K ids each), n ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.accelerator import copied
from recis_hybrid.embedding.compilation import not_recorded
from recis_hybrid.embedding.config import EmbeddingConfig
from recis_hybrid.embedding.table.lookup import FeatureIds, Request
from recis_hybrid.ops.gather import Bags
from recis_hybrid.ragged import Batch, RaggedTensor, arrays

_KINDS = {"sum": 0, "mean": 1, "sqrtn": 2, "max": 3, "tile": 0, None: 0}


@dataclass(frozen=True, eq=False)
class DistinctIds:
    """The distinct ids of a column, in place of the column; its output has one vector per id.

    :func:`distinct_columns` makes it. Combiner, weights and ``max_length`` do not apply.
    """

    ids: Tensor
    """int64 ``[U]``."""
    offsets: Tensor
    """int64 ``[R + 1]``: 0 to U, then U again: the vectors from U on are zeros and take no gradient."""
    samples: int
    """Number of rows of the column, which weighs this rank's gradients."""


@dataclass(frozen=True)
class FeatureReader:
    """Reads one feature's column."""

    name: str
    member: int
    config: EmbeddingConfig

    @property
    def plain(self) -> bool:
        """True if an int64 column ``[B]`` can be used unchanged, with one id per bag."""
        return self.config.weights is None and self.config.combiner != "tile"

    def __call__(self, batch: Batch, device: torch.device) -> tuple[FeatureIds, tuple[int, ...]]:
        """Return the ids, and the shape of the feature's output.

        Args:
            batch: Must have the column: ``[B]``, one id per bag; ``[B, L]``, L ids per bag; ``[B, L, K]``, L bags per
                row with K ids each; or a RaggedTensor, whose innermost lists are the bags. A missing optional column
                has no ids and no bags.
            device: Device of the ids.

        Raises:
            KeyError: If the batch lacks the column or its column of weights.
            TypeError: If ids are not integers, or weights are not floating-point numbers.
            ValueError: If shapes are wrong.
        """
        config = self.config
        distinct: Any = batch.get(self.name) if isinstance(batch, Mapping) else None
        if isinstance(distinct, DistinctIds):
            bags, zeros = distinct.offsets.numel() - 1, config.unknown == "zeros"
            return FeatureIds(distinct.ids, bags, self.member, distinct.offsets, unknown_zeros=zeros), (
                bags,
                config.dim,
            )
        column: Tensor | RaggedTensor = torch.empty(0, dtype=torch.int64, device=device)
        weights = None
        if not config.optional or self.name in batch:
            column = self._column(batch, self.name)
            weights = self._weights(batch, column)
        values = self._checked(column)
        if isinstance(column, RaggedTensor):
            length = None
            ids, weights, offsets, used = self._ragged(column, weights, device)
            bags = offsets.numel() - 1
            shape: tuple[int, ...] = (bags,)
        else:
            used = None
            shape = tuple(values.shape if values.dim() == 1 else values.shape[:-1])
            ids, weights, length = self._dense(values, weights, device)
            bags = math.prod(shape)
            offsets = torch.arange(bags + 1, dtype=torch.int64, device=device) * length
        if config.combiner is None:
            if isinstance(column, RaggedTensor):
                shape = (ids.numel(),)
            elif column.dim() > 1:
                assert length is not None
                shape = (*shape, length)
            return self._ids(ids, ids.numel(), used=used), (*shape, config.dim)
        if config.combiner == "tile":
            assert config.max_length is not None
            vectors = bags * config.max_length
            return self._ids(ids, vectors, offsets, tile=config.max_length, used=used), (*shape, config.width)
        return self._ids(ids, bags, None if length == 1 else offsets, weights, used=used), (*shape, config.dim)

    def flat(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | tuple[int, ...]]:
        """Return the ids of a column, int64 ``[n]``, without bags; waits for the device.

        Lists are cut to ``max_length``.

        Returns:
            The ids; and the offsets of a RaggedTensor's innermost lists, int64 ``[bags + 1]``, or the shape of dense
            ids.
        """
        column = self._column(batch, self.name)
        values = self._checked(column)
        if isinstance(column, RaggedTensor):
            ids, _, offsets, _ = self._ragged(column, None, device)
            return ids[: int(offsets[-1])], offsets
        ids, _, length = self._dense(values, None, device)
        return ids, (*values.shape[:-1], length) if values.dim() > 1 else tuple(values.shape)

    def _checked(self, column: Tensor | RaggedTensor) -> Tensor:
        """Return the ids of a column in their own shape, after checking shape and dtype."""
        values = column.values if isinstance(column, RaggedTensor) else column
        if values.dtype not in (torch.int64, torch.int32):
            hint = "hash it first (features.Hash)" if values.dtype == torch.uint8 else "cast it, or bucketize it first"
            raise TypeError(f"{self._where}: ids must be int64 or int32, got {values.dtype}; {hint}")
        if isinstance(column, RaggedTensor):
            if values.dim() != 1:
                raise ValueError(f"{self._where}: ragged ids must be [N], got {list(values.shape)}")
        elif values.dim() == 0:
            raise ValueError(
                f"{self._where}: ids must be [B], [B, L], [B, L, K] or a RaggedTensor, got {list(values.shape)}"
            )
        return values

    def _dense(self, ids: Tensor, weights: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None, int]:
        """Return the ids and weights of bags of equal length, and that length."""
        most = self.config.max_length
        length = ids.size(-1) if ids.dim() > 1 else 1
        if most is not None and length > most:
            if weights is not None:
                weights = weights.view(ids.shape)[..., :most]
            ids, length = ids[..., :most], most
        return _whole(ids, device), None if weights is None else _onto(device, weights.reshape(-1)), length

    def _ragged(
        self, column: RaggedTensor, weights: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return the ids, weights and offsets of lists, and ``used`` as in :class:`FeatureIds`.

        Columns on the CPU are shortened there, so that only the ids in use are copied, and the host knows their number.
        """
        where = torch.device("cpu") if device.type == "cpu" or column.values.is_cpu else device
        ids, offsets = _whole(column.values, where), _onto(where, column.offsets).contiguous()
        weights = None if weights is None else _onto(where, weights)
        if column.outer and column.outer[-1].is_cpu:
            offsets = offsets[: int(column.outer[-1][-1]) + 1]  # the tensor may have room for more lists
        most = self.config.max_length
        if most is not None:
            planes = [ids] if weights is None else [ids, weights]
            offsets, planes = ops.ragged.shorten(offsets, planes, most, self._where)
            ids, weights = planes[0], None if weights is None else planes[1]
        # After lists are shortened on a GPU, only part of the values is valid, and the host does not know how many. It
        # must know the number of outputs, though.
        if offsets.is_cpu or (most is not None and self.config.combiner is None):
            valid = int(offsets[-1])
            ids, weights = ids[:valid], None if weights is None else weights[:valid]
        if self.config.combiner is not None:  # without a combiner, only their number matters
            offsets = _onto(device, offsets)
        used = None if where.type == "cpu" else offsets
        return _onto(device, ids), None if weights is None else _onto(device, weights), offsets, used

    def _ids(
        self,
        ids: Tensor,
        vectors: int,
        offsets: Tensor | None = None,
        weights: Tensor | None = None,
        tile: int = 0,
        used: Tensor | None = None,
    ) -> FeatureIds:
        kind, zeros = _KINDS[self.config.combiner], self.config.unknown == "zeros"
        if offsets is None and weights is None:
            kind = ops.gather.SUM  # all combiners agree on bags of one id
        return FeatureIds(ids, vectors, self.member, offsets, weights, kind, tile, zeros, used)

    def _weights(self, batch: Batch, column: Tensor | RaggedTensor) -> Tensor | None:
        """Return the weights of a column, float32 ``[n]``, on their own device."""
        name = self.config.weights
        if name is None:
            if not isinstance(column, RaggedTensor) or column.weights is None:
                return None
            if self.config.combiner in ("max", "tile", None):
                raise ValueError(
                    f"{self._where}: the combiner {self.config.combiner!r} takes no weights, but the column carries "
                    f"some; drop them, or use 'sum', 'mean' or 'sqrtn'"
                )
            return self._as_weights(column.weights, "weights", column.values)
        weights = self._column(batch, name)
        ids = column.values if isinstance(column, RaggedTensor) else column
        if not isinstance(weights, RaggedTensor):
            return self._as_weights(weights, repr(name), ids)
        self._refuse_other_rows(column, weights, name)
        return self._as_weights(weights.values, repr(name), ids)

    def _refuse_other_rows(self, column: Tensor | RaggedTensor, weights: RaggedTensor, name: str) -> None:
        """Raise ValueError if ragged weights and the ids have different offsets."""
        if not isinstance(column, RaggedTensor):
            raise ValueError(
                f"{self._where}: {name!r} is ragged, but the ids are {list(column.shape)}; pass the weights in the "
                f"ids' shape, or the ids as a RaggedTensor too"
            )
        same = column.levels == weights.levels and all(map(_same_offsets, _levels(column), _levels(weights)))
        if not same:
            raise ValueError(
                f"{self._where}: {name!r} must have one weight for each id of every row: "
                f"{_row_differences(column, weights)}"
            )

    def _as_weights(self, weights: Tensor, name: str, ids: Tensor) -> Tensor:
        if not weights.dtype.is_floating_point:
            raise TypeError(f"{self._where}: {name} must be floating-point numbers, got {weights.dtype}; cast them")
        if weights.shape != ids.shape:
            raise ValueError(
                f"{self._where}: there must be one weight for each id, but {name} has the shape {list(weights.shape)} "
                f"and the ids have {list(ids.shape)}"
            )
        if weights.requires_grad:
            raise ValueError(f"{self._where}: {name} must not require a gradient; detach() them")
        return weights.to(torch.float32).contiguous().view(-1)

    def _column(self, batch: Batch, name: str) -> Tensor | RaggedTensor:
        if not isinstance(batch, Mapping):
            raise TypeError(f"{self._where}: a batch must be a dict of columns by name, got a {type(batch).__name__}")
        if name not in batch:
            raise KeyError(f"{self._where}: the batch has no column {name!r}; it has {sorted(batch)}")
        column = batch[name]
        if isinstance(column, torch.fx.Proxy):
            raise not_recorded("torch.fx.symbolic_trace")
        return arrays.as_column(f"{self._where}: column {name!r}", column)

    @property
    def _where(self) -> str:
        return f"feature {self.name!r}"


def _onto(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor if tensor.device == device else copied(tensor, device)


def _whole(ids: Tensor, device: torch.device) -> Tensor:
    """Return ids as contiguous int64 ``[n]`` on a device."""
    return _onto(device, ids.to(torch.int64).contiguous().view(-1))


def _row_differences(ids: RaggedTensor, weights: RaggedTensor) -> str:
    if weights.levels != ids.levels or weights.batch_size != ids.batch_size:
        rows, levels = weights.batch_size, weights.levels
        return f"the weights have {rows} rows and {levels} levels, the ids {ids.batch_size} and {ids.levels}"
    level = [_same_offsets(*pair) for pair in zip(_levels(ids), _levels(weights), strict=True)].index(False)
    ours, theirs = _levels(ids)[level].diff(), _levels(weights)[level].diff()
    row = int((ours != theirs).nonzero()[0])
    where, what = "row" if level == 0 else "list", "ids" if level + 1 == ids.levels else "lists of ids"
    return f"{where} {row} has {int(theirs[row])} for {int(ours[row])} {what}"


def _levels(column: RaggedTensor) -> tuple[Tensor, ...]:
    return (*column.outer, column.offsets)


def _same_offsets(ours: Tensor, theirs: Tensor) -> bool:
    if ours is theirs:
        return True
    # Offsets on a GPU are not compared, because the host would have to wait for them.
    compared = ours.is_cpu and theirs.is_cpu
    return ours.shape == theirs.shape and (not compared or np.array_equal(ours.numpy(), theirs.numpy()))


def _is_plain(column: Tensor | RaggedTensor, device: torch.device) -> TypeGuard[Tensor]:
    return (
        type(column) is Tensor
        and column.dtype is torch.int64
        and column.ndim == 1
        and column.device == device
        and column.is_contiguous()
    )


class TableReader:
    """Reads the columns of all features of a table.

    Args:
        readers: One for each feature.
    """

    def __init__(self, readers: list[FeatureReader]) -> None:
        self.readers = readers
        self._names = [reader.name for reader in readers]
        self._members = [reader.member for reader in readers]
        self.unknown = [-1 if r.config.unknown == "zeros" else r.member for r in readers]
        """For each feature, the member table whose first values unknown ids get; -1: zeros."""
        self._dim = readers[0].config.dim
        self._plain = all(reader.plain for reader in readers)

    def __call__(self, batch: Batch, device: torch.device) -> tuple[Request, list[tuple[int, ...]]]:
        """Return the ids of all features, and the shapes of their outputs; see :class:`FeatureReader`."""
        if self._plain:
            # A fast path for the most common case; it matters for steps with few ids.
            columns = [batch[name] for name in self._names if name in batch]
            bags = [column.numel() for column in columns if _is_plain(column, device)]
            if len(bags) == len(self._names):
                ids: list[Tensor] = columns  # type: ignore[assignment]
                request = Request(ids, self._members, Bags.single(bags), self.unknown)
                return request, [(count, self._dim) for count in bags]
        read = [reader(batch, device) for reader in self.readers]
        return Request.of([ids for ids, _ in read]), [shape for _, shape in read]


def samples_of(batch: Batch, features: Iterable[str]) -> int:
    """Return the number of samples of a batch: the largest number of rows of a feature's column."""
    return max((_rows_of(batch[name]) for name in features if name in batch), default=0)


def _rows_of(column: Any) -> int:
    if isinstance(column, DistinctIds):
        return column.samples
    column = arrays.as_column("batch", column)
    return column.batch_size if isinstance(column, RaggedTensor) else column.size(0)


def distinct_columns(
    tables: Sequence[TableReader],
    batch: Batch,
    features: Iterable[str],
    room: Callable[[str, int], int],
    device: torch.device,
) -> tuple[dict[str, DistinctIds], dict[str, Tensor | RaggedTensor]]:
    """Return the distinct ids of features, and the indices of each column's ids among them; waits for the device.

    Args:
        tables: Readers of all features.
        batch: Must have the columns of the features, except of optional ones.
        features: Names of features.
        room: (feature, number of distinct ids U) → number of vectors R of the feature, more than U.
        device: Device of the results.

    Raises:
        KeyError: If there is no such feature, or the batch lacks its column.
        ValueError: If a number of vectors is too small.

    Returns:
        By feature, the column for the lookup; and the indices, int32 in the shape of dense ids, or a RaggedTensor of
        the innermost lists.
    """
    known = {reader.name: reader for table in tables for reader in table.readers}
    names = list(dict.fromkeys(features))
    if unknown := [name for name in names if name not in known]:
        raise KeyError(f"distinct: {unknown} are not features of this engine")
    readers = [known[name] for name in names if name in batch or not known[name].config.optional]
    if not readers:
        return {}, {}
    read = [reader.flat(batch, device) for reader in readers]
    lengths = [ids.numel() for ids, _ in read]
    kinds = range(len(readers))
    found = ops.gather.distinct_ids([ids for ids, _ in read], kinds, [-1] * len(readers), 1, Bags.single(lengths))
    sizes = found.sizes[0].tolist()
    # The ids are ordered by kind, which is the feature.
    parts = found.ids[: sum(sizes)].split(sizes)
    columns: dict[str, DistinctIds] = {}
    indices: dict[str, Tensor | RaggedTensor] = {}
    first = 0
    for reader, (_, form), ids, places in zip(readers, read, parts, found.places.split(lengths), strict=True):
        name, size = reader.name, ids.numel()
        vectors = room(name, size)
        if vectors <= size:
            raise ValueError(
                f"distinct: room({name!r}, {size}) must be more than the number of distinct ids, got {vectors}"
            )
        offsets = torch.arange(vectors + 1, dtype=torch.int64, device=device).clamp_(max=size)
        columns[name] = DistinctIds(ids, offsets, _rows_of(batch[name]))
        index = (places - first).to(torch.int32)
        indices[name] = RaggedTensor.unchecked(index, form) if isinstance(form, Tensor) else index.view(form)
        first += size
    return columns, indices
