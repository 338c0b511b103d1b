"""Tables as a dict in plain Python and numpy: rows, admission counts and optimizers, to compare with an engine.

The rules are in ``table_rules``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recis_hybrid.embedding.initializers import table_key
from tests.support import philox
from tests.support.near import roundings
from tests.support.table_rules import Array, EvictionCase, Gate, Moment, Parts, Row, Rule, Times, Unwanted

META = ("updated_step", "seen_step", "frequency")


class TableModel:
    """A member table whose initializer is ``Uniform(-1, 1)``.

    Args:
        name: Its name.
        dim: Elements of a vector.
        seed: Seed of the engine.
        dtype: Dtype of embeddings.
        rule: Its optimizer.
        gate: Admission; None: all ids.
        zeros: True if ids without a row have zeros, otherwise their first value.
    """

    def __init__(
        self, name: str, dim: int, seed: int, dtype: torch.dtype, rule: Rule, gate: Gate | None, zeros: bool
    ) -> None:
        self.name, self.dim, self.dtype, self.rule, self.gate, self.zeros = name, dim, dtype, rule, gate, zeros
        self._key = table_key(seed, name)
        self.rows: dict[int, Row] = {}
        self.times = Times()

    def new_row(self, i: int) -> Row:
        """Return a row with first values."""
        embedding = philox.uniform(self._key, np.array([i]), self.dim, -1.0, 1.0)[0]
        parts = {"embedding": torch.from_numpy(embedding).to(self.dtype).double().numpy()}
        for state in self.rule.spec.row_state:
            parts[state.name] = np.full(state.width or self.dim, np.float32(state.first_value), np.float64)
        return Row(parts)

    def vectors(self, ids: Sequence[int]) -> Array:
        """Return what a lookup of ids outputs, ``[n, dim]``."""
        out = np.zeros((len(ids), self.dim))
        for at, i in enumerate(ids):
            if i in self.rows:
                out[at] = self.rows[i].parts["embedding"]
            elif not self.zeros:
                out[at] = self.new_row(i).parts["embedding"]
        return out

    def look_up(self, ids: Sequence[int], step: int) -> Array:
        """Do a training lookup of step ``step``, and return its output."""
        missing = [i for i in ids if i not in self.rows]
        if self.gate is not None:
            self.gate.age(step - 1)
        for i in set(missing) if self.gate is None else self.gate.admitted(missing):
            self.rows[i] = self.new_row(i)
        for i in ids:
            if (row := self.rows.get(i)) is not None:
                row.seen, row.frequency = step, row.frequency + 1
        return self.vectors(ids)

    def update(self, gradients: Mapping[int, Array], step: int, found: Mapping[str, Tensor]) -> None:
        """Do an optimizer step, compare it with the rows that the engine has now, and take over their rounding.

        Args:
            gradients: Summed gradients by id; only of ids with a row.
            step: Steps including this one.
            found: The engine's columns, rows by ascending id.
        """
        ids = sorted(gradients)
        if not ids:
            return
        at = np.searchsorted(found["ids"].numpy(), ids)
        rows = [self.rows[i] for i in ids]
        expected = [
            self.rule.update(row.parts, gradients[i], step, step - row.updated)
            for i, row in zip(ids, rows, strict=True)
        ]
        for part in expected[0]:
            got = found[part][at]
            want = torch.from_numpy(np.stack([np.broadcast_to(each[part], got.shape[1:]) for each in expected]))
            error = roundings(got.float(), want.float())
            if got.dtype != torch.float32:
                # Stochastic rounding takes one of the two neighbors.
                spacing = 1.001 * torch.finfo(got.dtype).eps * want.abs() + torch.finfo(got.dtype).smallest_normal
                error = torch.where((got.double() - want).abs() <= spacing, 0.0, error)
            assert bool((error <= self.rule.allowed).all()), (self.name, part, got, want)
            for i, values in zip(ids, got.double().numpy(), strict=True):
                self.rows[i].parts[part] = values
        for i in ids:
            self.rows[i].updated = step

    def insert(self, ids: Iterable[int], parts: Parts, meta: tuple[int, int, int] | None, step: int) -> None:
        """Write parts, and metadata if given, into rows."""
        for i in ids:
            row = self.rows.setdefault(i, self.new_row(i))
            row.parts |= parts
            if meta is None:
                row.seen = max(row.seen, step)
            else:
                row.updated, row.seen, row.frequency = meta
        if self.gate is not None:
            self.gate.forget(ids)

    def erase(self, ids: Iterable[int]) -> int:
        """Erase rows, and return how many there were."""
        return sum(self.rows.pop(i, None) is not None for i in set(ids))

    def unwanted(self, case: EvictionCase, step: int, now: float = 0.0, record_bytes: int = 1) -> Unwanted:
        """Return what a rule decides about each row."""
        return case.select(self.rows, Moment(step, now, self.times, record_bytes))

    def evict(self, unwanted: Unwanted, among: Callable[[int, Row], bool] = lambda *_: True) -> int:
        """Erase the rows that :meth:`unwanted` selects among some, and return how many there were."""
        return self.erase([i for i, row in self.rows.items() if among(i, row) and unwanted(i, row)])

    def clear(self) -> None:
        """Erase all rows, and drop the state of admission."""
        self.rows = {}
        if self.gate is not None:
            self.gate.clear()

    def check(
        self, columns: Mapping[str, Tensor], counts: Mapping[str, Any] | None, owns: Callable[[int], bool]
    ) -> None:
        """Assert that an engine has the same rows and admission state, bit for bit.

        Args:
            columns: The engine's columns, rows by ascending id.
            counts: Its admission state, by ascending id.
            owns: Returns whether it should have an id.
        """
        ids = sorted(filter(owns, self.rows))
        assert columns["ids"].tolist() == ids, self.name
        if ids:
            rows = [self.rows[i] for i in ids]
            for part in rows[0].parts:
                want = np.stack([row.parts[part] for row in rows])
                assert np.array_equal(columns[part].double().numpy(), want), (self.name, part)
            assert torch.stack([columns[name] for name in META], 1).tolist() == [list(row.meta) for row in rows]
        assert (counts is None) == (self.gate is None)
        if self.gate is not None and counts is not None:
            self.gate.check(counts, owns)
