"""Evictions and compactions that are spread over calls, between which the training continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from recis_hybrid.embedding.eviction import Cutoff, EvictionRule, SharedRows
from recis_hybrid.embedding.table.compaction import Compaction
from recis_hybrid.embedding.table.hash_table import HashTable


class EvictionSweep(Iterator[int]):
    """An eviction in progress, made by ``EmbeddingEngine.evict(..., rows_per_call=)``.

    Each ``next`` applies the rules to one share of the rows, erases those that they select, and returns their number on
    this process. Rows that a training lookup has seen since the sweep began are kept; otherwise, rules get the steps of
    the beginning, so that all shares together erase the same rows as one eviction then. Rules by time get the time of
    the call. Shares depend on ids alone, and the outcome does not depend on the number of ranks. All ranks must make
    the same calls between the same steps, which are collective if the rules are.

    Between calls, tables may be looked up, trained, saved, evicted and compacted. A table that has been cleared or
    loaded since keeps its rows. Lookups from before a call are invalid after it. If a call raises, no row of its share
    is erased, and it may be repeated.

    Args:
        rules: The tables, each with the result of ``HashTable.ranked`` and its distribution over ranks.
        calls: Number of shares.
    """

    def __init__(
        self,
        rules: Sequence[tuple[HashTable, EvictionRule | Mapping[int, EvictionRule], SharedRows]],
        calls: int,
    ) -> None:
        self._rules = list(rules)
        self.calls = calls
        """Number of calls in all."""
        self.done = 0
        """Calls made so far."""
        self._since = [table.step for table, _, _ in rules]
        self._maps = [table.store.id_map for table, _, _ in rules]

    def __next__(self) -> int:
        """Evict from the next share of the rows, and return the number of rows erased on this process.

        Raises:
            RuntimeError: If a table has pending gradients.
            StopIteration: If the eviction is complete.
            TypeError: As ``EmbeddingEngine.evict``.
            ValueError: As ``EmbeddingEngine.evict``.
        """
        if self.done >= self.calls:
            raise StopIteration
        share = self.done, self.calls
        # Apply the rules to all tables before the first row is erased.
        evicted = [
            (table, table.evicted_by(rule, shared, share=share, since=since))
            for (table, rule, shared), since, id_map in zip(self._rules, self._since, self._maps, strict=True)
            if table.store.id_map is id_map
        ]
        self.done += 1
        return sum(table.erase_evicted(rows) for table, rows in evicted)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to continue after a restart, with any number of ranks."""
        since = {
            m.name: step
            for (table, _, _), step, id_map in zip(self._rules, self._since, self._maps, strict=True)
            if table.store.id_map is id_map
            for m in table.members
        }
        cutoffs = {table.members[member].name: [rule.rank, rule.last_id] for table, member, rule in self._cutoffs()}
        return {"calls": self.calls, "done": self.done, "since": since, "cutoffs": cutoffs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, after the tables are loaded."""
        self.calls, self.done = int(state["calls"]), int(state["done"])
        since, cutoffs = state["since"], state.get("cutoffs", {})
        for number, (table, rule, shared) in enumerate(self._rules):
            steps = [int(since[m.name]) for m in table.members if m.name in since]
            if not steps:  # it had been cleared
                rule = {}
            elif isinstance(rule, Mapping):
                rule = {
                    member: replace(each, rank=cutoffs[name][0], last_id=cutoffs[name][1])
                    if isinstance(each, Cutoff)
                    else each
                    for member, each in rule.items()
                    for name in [table.members[member].name]
                }
            self._rules[number], self._since[number] = (table, rule, shared), max(steps, default=0)

    def _cutoffs(self) -> Iterator[tuple[HashTable, int, Cutoff]]:
        """Yield the results of ranking rows, each with its table and the number of its member table."""
        for table, rule, _ in self._rules:
            for member, each in rule.items() if isinstance(rule, Mapping) else ():
                if isinstance(each, Cutoff):
                    yield table, member, each


class CompactionSweep(Iterator[int]):
    """A compaction in progress, made by ``EmbeddingEngine.compact(rows_per_call=)``.

    Each ``next`` works on about ``rows`` rows and returns how many have moved, on this process. It also works off free
    rows, so calls may move none. Memory is freed by the last call for a table, that of the IDMap only if it has at most
    16 slots for each row of a call.

    Between calls, tables may be looked up, trained, saved, evicted and cleared. Another compaction of a table ends this
    one. Lookups from before a call are invalid after it. If a call raises, it may be repeated.

    Args:
        tables: The tables.
        rows: Rows per call.
    """

    def __init__(self, tables: Sequence[HashTable], rows: int) -> None:
        self._waiting = list(reversed(tables))
        self._rows = rows
        self._current: tuple[HashTable, Compaction] | None = None

    def __next__(self) -> int:
        """Continue, and return how many rows have moved.

        Raises:
            RuntimeError: If a table has pending gradients.
            StopIteration: If the compaction is complete.
        """
        while True:
            if self._current is not None:
                table, compaction = self._current
                moved = table.continue_compaction(compaction, self._rows)
                if moved is not None:
                    return moved
                self._current = None
            if not self._waiting:
                raise StopIteration
            table = self._waiting.pop()
            self._current = table, table.begin_compaction()
