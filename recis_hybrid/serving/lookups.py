"""Lookups of a request: ids of features → pooled embeddings, as the engine computes them in evaluation.

Letters: B rows, n ids, D dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from recis_hybrid.serving.columns import Array, Column, offsets_of
from recis_hybrid.serving.errors import InputError, ServingError
from recis_hybrid.serving.first_values import FirstValues, first_values

_INT64 = np.dtype(np.int64)
COMBINERS = ("sum", "mean", "sqrtn", "max", "tile", None)
"""Combiners of the vectors of a row."""


class AnyTable(Protocol):
    """Rows of a table: an export's, or those with updates above them."""

    dim: int

    def read(self, ids: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        """Return new embeddings, float32 ``[n, D]``, and whether each id has a row, bool ``[n]``."""

    def read_one(self, id: int) -> Array | None:
        """Return the embedding of an id, float32 ``[1, D]``, which must not be written to; None if it has no row."""


class _Lookup(NamedTuple):
    feature: str
    combiner: str | None
    max_length: int | None
    weights: str | None
    zeros: bool
    """True if an id without a row has zeros, False if it has the first value of its row."""


class _Bags(NamedTuple):
    ids: npt.NDArray[np.int64]
    offsets: Array | None
    """int64 ``[bags + 1]``, or None for one id a bag."""
    weights: Array | None
    shape: tuple[int, ...]
    """The shape of the output without its last dimension."""


class Lookups:
    """All lookups of a bundle.

    Args:
        where: The bundle, for messages.
        document: ``lookups`` and ``tables`` of the bundle.
        dims: Widths of the tables by name.

    Raises:
        ServingError: A lookup is not valid.
    """

    def __init__(self, where: str, document: Mapping[str, Any], dims: Mapping[str, int]) -> None:
        self._of_table: dict[str, list[_Lookup]] = {}
        for item in document["lookups"]:
            if item["combiner"] not in COMBINERS:
                raise ServingError(
                    f"{where}: feature {item['feature']!r}: unknown combiner {item['combiner']!r}. The bundle was "
                    f"written by a newer version; update recis_hybrid."
                )
            if item["table"] not in dims:
                raise ServingError(f"{where}: there is no table {item['table']!r}, only {list(dims)}. Export it again.")
            zeros = item["unknown"] == "zeros"
            lookup = _Lookup(item["feature"], item["combiner"], item["max_length"], item["weights"], zeros)
            self._of_table.setdefault(item["table"], []).append(lookup)
        # Most lookups of a request are of one id a row in a table of its own, and need no pooling.
        self._alone = {
            name: lookup.feature
            for name, (lookup, *others) in self._of_table.items()
            if not others and lookup.weights is None and lookup.combiner != "tile"
        }
        first = {name: document["tables"][name]["first_value"] for name in self._of_table}
        self._first = {name: FirstValues(value, dims[name]) for name, value in first.items()}

    def run(self, tables: Mapping[str, AnyTable], features: Mapping[str, Column]) -> dict[str, Array]:
        """Return the vectors of each feature, float32 ``[B, D]``, ``[B, L, D]`` without a combiner.

        Args:
            tables: The tables by name.
            features: The features of a request.

        Raises:
            InputError: Weights do not belong to their ids.
        """
        out: dict[str, Array] = {}
        read: dict[str, list[_Bags]] = {}
        for name, lookups in self._of_table.items():
            feature = self._alone.get(name)
            if feature is not None:
                ids, offsets, weights, _ = features[feature]
                if offsets is None and weights is None and ids.ndim == 1 and ids.dtype == _INT64:
                    table = tables[name]
                    found = table.read_one(ids.item()) if len(ids) == 1 else _read_all(table, ids)
                    if found is not None:
                        out[feature] = found
                        continue
            read[name] = [_bags(lookup, features) for lookup in lookups]
        vectors: dict[str, Array] = {}
        unknown: list[tuple[str, Array, Array]] = []
        for name, bags in read.items():
            ids = bags[0].ids if len(bags) == 1 else np.concatenate([each.ids for each in bags])
            vectors[name], exists = tables[name].read(ids)
            if np.count_nonzero(exists) < len(exists):
                places = np.flatnonzero(~exists)
                unknown.append((name, places, ids[places]))
        if unknown:
            self._fill(read, vectors, unknown)
        for name in read:
            lookups = self._of_table[name]
            first = 0
            for lookup, each in zip(lookups, read[name], strict=True):
                part = vectors[name][first : first + len(each.ids)]
                first += len(each.ids)
                out[lookup.feature] = _pooled(lookup, each, part)
        return out

    def _fill(
        self,
        read: Mapping[str, Sequence[_Bags]],
        vectors: Mapping[str, Array],
        unknown: Sequence[tuple[str, Array, Array]],
    ) -> None:
        """Write the vectors of ids without a row: the first values of their rows, or zeros."""
        drawn = first_values([(self._first[name], ids) for name, _, ids in unknown])
        for (name, places, _), values in zip(unknown, drawn, strict=True):
            vectors[name][places] = values
            begin = 0
            for lookup, bags in zip(self._of_table[name], read[name], strict=True):
                end = begin + len(bags.ids)
                if lookup.zeros:
                    vectors[name][places[(places >= begin) & (places < end)]] = 0
                begin = end


def _read_all(table: AnyTable, ids: npt.NDArray[np.int64]) -> Array | None:
    """Return the embeddings of ids, float32 ``[n, D]``, or None if one of them has no row."""
    vectors, found = table.read(ids)
    return vectors if np.count_nonzero(found) == len(ids) else None


def _bags(lookup: _Lookup, features: Mapping[str, Column]) -> _Bags:
    column = features[lookup.feature]
    weights = _weights_of(lookup, column, features)
    ids = column.values.astype(np.int64, copy=False)
    most = lookup.max_length
    if column.offsets is None:
        if ids.ndim > 1 and most is not None and ids.shape[-1] > most:
            ids = ids[..., :most]
            weights = None if weights is None else weights.reshape(column.values.shape)[..., :most]
        shape = ids.shape if ids.ndim == 1 or lookup.combiner is None else ids.shape[:-1]
        length = 1 if ids.ndim == 1 else ids.shape[-1]
        offsets = None
        if lookup.combiner is not None and (length != 1 or weights is not None or lookup.combiner == "tile"):
            offsets = np.arange(int(np.prod(shape)) + 1) * length
        return _Bags(ids.reshape(-1), offsets, None if weights is None else weights.reshape(-1), shape)
    offsets = column.offsets
    if most is not None and len(offsets) > 1:
        lengths = np.diff(offsets)
        if lengths.max() > most:
            kept = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths) < most
            ids, weights = ids[kept], None if weights is None else weights[kept]
            offsets = offsets_of(np.minimum(lengths, most))
    return _Bags(ids, offsets, weights, (len(offsets) - 1,))


def _weights_of(lookup: _Lookup, column: Column, features: Mapping[str, Column]) -> Array | None:
    if lookup.weights is None:
        return column.weights
    weights = features[lookup.weights]
    same = weights.values.shape == column.values.shape
    if same and weights.offsets is not None and column.offsets is not None:
        same = np.array_equal(weights.offsets, column.offsets)
    if not same:
        raise InputError(
            f"feature {lookup.feature!r}: {lookup.weights!r} must have one weight for each id of every row, got "
            f"{weights.values.shape[0]} weights for {column.values.shape[0]} ids; send lists of equal lengths"
        )
    return weights.values.astype(np.float32, copy=False)


def _pooled(lookup: _Lookup, bags: _Bags, vectors: Array) -> Array:
    dim = vectors.shape[1]
    if bags.offsets is None or lookup.combiner is None:
        return vectors.reshape(*bags.shape, dim)
    if lookup.combiner == "tile":
        return _tiled(bags, vectors, lookup.max_length or 1)
    lengths = np.diff(bags.offsets)
    if lookup.combiner == "max":
        return _greatest(bags.offsets, lengths, vectors).reshape(*bags.shape, dim)
    if bags.weights is not None:
        vectors = vectors * bags.weights[:, None]
    sums = summed(vectors, bags.offsets, lengths)
    if lookup.combiner != "sum":
        total = lengths.astype(np.float32)
        if bags.weights is not None:
            factors = bags.weights if lookup.combiner == "mean" else bags.weights * bags.weights
            total = summed(factors[:, None], bags.offsets, lengths)[:, 0]
        if lookup.combiner == "sqrtn":
            total = np.sqrt(total)
        # Weights that add up to zero give zeros.
        norm = np.zeros_like(total)
        np.divide(np.float32(1), total, out=norm, where=total != 0)
        sums = sums * norm[:, None]
    return sums.reshape(*bags.shape, dim)


def summed(vectors: Array, offsets: Array, lengths: Array) -> Array:
    """Return the sum of each bag, float32 ``[bags, D]``, added in the order of its vectors as the engine adds them.

    Args:
        vectors: float32 ``[n, D]``.
        offsets: int64 ``[bags + 1]``.
        lengths: int64 ``[bags]``.
    """
    out = np.zeros((len(lengths), vectors.shape[1]), np.float32)
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > len(lengths):
        # Few long bags; accumulate adds one after another, where a reduction would add pairs.
        for bag, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            if end > begin:
                out[bag] = np.add.accumulate(vectors[begin:end], axis=0)[-1]
        return out
    if longest == 0:
        return out
    if int(lengths.min()) == longest:
        for place in range(longest):
            out += vectors[offsets[:-1] + place]
        return out
    order = np.argsort(-lengths, kind="stable")
    begin = offsets[:-1][order]
    counts = np.count_nonzero(lengths[None, :] > np.arange(longest)[:, None], axis=1) if longest < 64 else None
    for place in range(longest):
        count = int(np.count_nonzero(lengths > place) if counts is None else counts[place])
        out[order[:count]] += vectors[begin[:count] + place]
    return out


def _greatest(offsets: Array, lengths: Array, vectors: Array) -> Array:
    out = np.zeros((len(lengths), vectors.shape[1]), np.float32)
    full = lengths > 0
    if full.any():
        out[full] = np.maximum.reduceat(vectors, offsets[:-1][full], axis=0)
    return out


def _tiled(bags: _Bags, vectors: Array, most: int) -> Array:
    assert bags.offsets is not None
    dim = vectors.shape[1]
    place = bags.offsets[:-1, None] + np.arange(most)
    real = place < bags.offsets[1:, None]
    padded = np.concatenate([vectors, np.zeros((1, dim), np.float32)])
    return padded[np.where(real, place, len(vectors))].reshape(*bags.shape, most * dim)
