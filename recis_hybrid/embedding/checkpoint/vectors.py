"""Rows from vectors that were computed elsewhere, such as the embeddings of a pretrained tower.

Letters: n ids, D dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recis_hybrid import distributed, ops
from recis_hybrid.embedding.checkpoint.ownership import Buckets, within
from recis_hybrid.embedding.distributed.column_split import own_columns
from recis_hybrid.embedding.distributed.exchange import ExchangeError
from recis_hybrid.embedding.table.hash_table import HashTable
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.ragged.arrays import as_column
from recis_hybrid.validation import describe_value

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class VectorLoader:
    """Writes vectors into the rows of a member table, chunk by chunk.

    Args:
        table: The logical table of this rank.
        member: Number of the member table.
        wanted: The buckets that this rank has.
    """

    def __init__(self, table: HashTable, member: int, wanted: Buckets) -> None:
        self._table, self._member, self._wanted = table, member, wanted
        self.where = f"table {table.members[member].name!r}: load_rows"
        """Prefix of messages."""
        self.rows = 0
        """Number of rows written on this rank."""
        self.passed = [0, 0]
        """Number of ids passed, and their sum modulo 2^64, which are equal on all ranks."""
        self._written: list[Tensor] = []

    def load(self, ids: Any, vectors: Any) -> None:
        """Write the rows that this rank has; arguments and errors as of :meth:`EmbeddingEngine.load_rows`."""
        table = self._table
        ids = self._checked_ids(ids)
        vectors = self._checked_vectors(ids, vectors)
        self.passed = [self.passed[0] + ids.numel(), self.passed[1] + int(ids.sum()) & (1 << 64) - 1]
        columns = own_columns({"ids": ids, "embedding": vectors}, table.layout)
        own = within(ops.id_map.bucket_of(ids), self._wanted, columns)
        self._refuse_written(own["ids"])
        rows = table.load(self._member, own["ids"], {"embedding": own["embedding"]})
        if not table.read_only:
            # As recent as after a lookup, so that the next eviction keeps them.
            table.store.mark_seen(rows, table.step)
        self.rows += rows.numel()
        self._written.append(own["ids"])

    def _checked_ids(self, ids: Any) -> Tensor:
        column = as_column(f"{self.where}: ids", ids)
        if isinstance(column, RaggedTensor) or column.dtype not in _INTEGERS or column.dim() != 1:
            raise ValueError(
                f"{self.where}: ids must be integers [n], got {_described(column)}; hash strings first, with the "
                f"operations that compute the feature's ids"
            )
        checked = column.to(self._table.device, torch.int64)
        ordered = checked.sort().values
        if (repeated := ordered[1:][ordered[1:] == ordered[:-1]]).numel():
            raise ValueError(f"{self.where}: ids must be distinct, got {int(repeated[0])} twice; drop one of its rows")
        return checked

    def _checked_vectors(self, ids: Tensor, vectors: Any) -> Tensor:
        """Return the vectors in the dtype of the table."""
        column = as_column(f"{self.where}: vectors", vectors)
        expected = [ids.numel(), self._table.layout.whole.dim]
        if isinstance(column, RaggedTensor) or list(column.shape) != expected or column.dtype not in _FLOATS:
            raise ValueError(
                f"{self.where}: vectors must be floats [n, dim] = {expected}, got {_described(column)}; pass a vector "
                f"for each id, or build the table with EmbeddingConfig(dim=) of the vectors' width"
            )
        values = column.detach().to(self._table.device)
        stored = values.to(self._table.layout.dtype)
        bad = (~stored.isfinite()).any(1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            value = values[row][~stored[row].isfinite()][0].item()
            remedy = "drop its row"
            if values[row].isfinite().all():
                remedy = f"which {stored.dtype} cannot hold; build the table with EmbeddingConfig(dtype=torch.float32)"
            raise ValueError(f"{self.where}: vectors must be finite, got {value} for id {int(ids[row])}; {remedy}")
        return stored

    def _refuse_written(self, ids: Tensor) -> None:
        """Raise ValueError if an earlier chunk had one of the ids."""
        known = ids[self._table.rows(self._member, ids) >= 0]
        if known.numel() and self._written:
            again = known[torch.isin(known, torch.cat(self._written))]
            if again.numel():
                raise ValueError(
                    f"{self.where}: ids must be distinct, got {int(again[0])} in two chunks; drop one of its rows. "
                    f"The rows of earlier chunks stay in the table"
                )


def _described(column: Tensor | RaggedTensor) -> str:
    return repr(column) if isinstance(column, RaggedTensor) else f"{column.dtype} {list(column.shape)}"


def load_vectors(loader: VectorLoader, ids: Any, vectors: Any, group: dist.ProcessGroup | None) -> None:
    """Write all rows; collective if ranks share the table.

    Args:
        loader: The loader of this rank's rows.
        ids: As for :meth:`EmbeddingEngine.load_rows`.
        vectors: Likewise.
        group: The ranks that share the table; None: only this process.

    Raises:
        ExchangeError: If ranks passed different rows.
        OtherRankError: If another rank failed.
        TypeError: See :meth:`EmbeddingEngine.load_rows`.
        ValueError: Likewise.
    """
    failure: Exception | None = None
    try:
        for chunk in _chunks(loader.where, ids, vectors):
            loader.load(*chunk)
    except Exception as error:
        if group is None:
            raise
        failure = error
    if group is None:
        return
    try:
        passed = distributed.all_succeed_or_raise(failure, loader.passed, group)
    finally:
        failure = None  # otherwise the exception and this frame would form a reference cycle
    if any(other != loader.passed for other in passed):
        raise ExchangeError(
            f"{loader.where}: every rank must pass the rows of all ranks, but they passed "
            f"{[count for count, _ in passed]} rows; read all rows on every rank, e.g. with columnio.read_vectors"
        )


def _chunks(where: str, ids: Any, vectors: Any) -> Iterator[tuple[Any, Any]]:
    """Yield pairs of ids and vectors: the two arguments, or the elements of ``ids`` if there are no vectors."""
    if vectors is not None:
        yield ids, vectors
        return
    if not isinstance(ids, Iterable):
        raise TypeError(f"{where} takes ids and vectors, or an iterable of such pairs, got {describe_value(ids)}")
    for chunk in ids:
        if not isinstance(chunk, tuple | list) or len(chunk) != 2:
            raise TypeError(
                f"{where} without vectors takes an iterable of pairs (ids, vectors), such as "
                f"columnio.read_vectors(...), got {describe_value(ids)} with {describe_value(chunk)} in it"
            )
        yield chunk[0], chunk[1]
