"""Rows between where a table keeps them and the ranks that own their buckets: in checkpoints every rank has its own.

Letters: n rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recis_hybrid.embedding.columns import whole_rows
from recis_hybrid.embedding.distinct import rank_of
from recis_hybrid.embedding.exchange import Exchange
from recis_hybrid.embedding.routing import Asks


class Mover:
    """Moves rows as columns; all ranks call it together, for the same tables in the same order.

    Args:
        exchange: With the other ranks.
        asks: Of each table: where its rows are.
    """

    def __init__(self, exchange: Exchange, asks: Sequence[Asks]) -> None:
        self._exchange = exchange
        self._asks = asks

    def to_buckets(self, table: int, member: int, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns those rows of a member table whose buckets this rank owns, wherever they are.

        Args:
            table: Number of the logical table.
            member: Number of the member table.
            columns: This rank's rows by (bucket, id): ``ids`` int64 ``[n]``, and others ``[n, ...]``.
        """
        asks, exchange = self._asks[table], self._exchange
        if asks.columns is not None:
            return whole_rows(columns, asks.columns, exchange)
        if asks.everywhere:
            mine = rank_of(columns["ids"].contiguous(), exchange.size) == exchange.rank
            return {name: values[mine] for name, values in columns.items()}
        if self._owner(asks, member) is None:
            return columns
        owners = rank_of(columns["ids"].contiguous(), exchange.size)
        # By bucket, and so by owner.
        return self._send(columns, owners.bincount(minlength=exchange.size).tolist())

    def from_buckets(self, table: int, member: int, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the rows of a member table that this rank keeps, of those whose buckets each rank owns."""
        asks, exchange = self._asks[table], self._exchange
        n = columns["ids"].numel()
        if asks.everywhere:
            each = {name: values for name, values in columns.items() if asks.columns is None or values.dim() == 1}
            copies = {name: values.repeat(exchange.size, *[1] * (values.dim() - 1)) for name, values in each.items()}
            here = self._send(copies, [n] * exchange.size)
            return {
                name: here[name] if name in here else self._split(values, asks.columns or [])
                for name, values in columns.items()
            }
        owner = self._owner(asks, member)
        return columns if owner is None else self._send(columns, [n * int(r == owner) for r in range(exchange.size)])

    def _split(self, values: Tensor, widths: list[int]) -> Tensor:
        """Returns this rank's elements, float ``[n, ...]``, of the rows that all ranks have."""
        exchange = self._exchange
        receive = [n for (n,) in exchange.all([values.size(0)])]
        mine = widths[exchange.rank]
        flat = torch.cat([part.reshape(-1) for part in values.split(widths, 1)])
        send = [values.size(0) * width for width in widths]
        came = exchange.start("rows", flat, send, [n * mine for n in receive]).wait()
        return came.view(-1, mine).to(values.device)

    def _owner(self, asks: Asks, member: int) -> int | None:
        return next((kind.owner for kind in asks.kinds if kind.member == member), None)

    def _send(self, columns: dict[str, Tensor], send: list[int]) -> dict[str, Tensor]:
        exchange = self._exchange
        receive = [line[0] for line in exchange.sizes(torch.tensor(send).view(-1, 1))[1]]
        sending = {name: exchange.start("rows", values, send, receive) for name, values in columns.items()}
        return {name: sending[name].wait().to(values.device) for name, values in columns.items()}
