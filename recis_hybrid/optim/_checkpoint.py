"""Saved state of a sparse optimizer, stored by member table so that it does not depend on coalescing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recis_hybrid.checkpointing import JSON, PartState
from recis_hybrid.ops.update import RULES
from recis_hybrid.optim.exact import RULE_NAMES, Run, history_of

_HISTORY = "history."
"""Prefix of the names of tensors with the steps recorded for a table."""


def optimizer_state(optimizer: torch.optim.Optimizer) -> PartState:
    """Return the hyperparameters of all groups, and the group and step count of each member table."""
    groups: list[JSON] = []
    tables: dict[str, JSON] = {}
    histories: dict[str, Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        groups.append(_settings(group))
        for anchor in group["params"]:
            step = optimizer.state.get(anchor, {}).get("step", anchor.table.step)
            entry: dict[str, JSON] = {"group": number, "step": step}
            history = history_of(anchor.table)
            if history is not None and history.runs:
                entry["rule"] = RULE_NAMES[history.runs[0].kind]
                runs = torch.tensor([run.numbers() for run in history.runs], dtype=torch.float64)
                histories |= {_HISTORY + member.name: runs for member in anchor.table.members}
            tables |= {member.name: entry for member in anchor.table.members}
    meta: dict[str, JSON] = {"class": type(optimizer).__name__, "groups": groups, "tables": tables}
    return PartState(tensors=histories, meta=meta)


class OptimizerLoader:
    """Loads the state that :func:`optimizer_state` returned, either completely or not at all.

    Args:
        optimizer: The optimizer to load into.
        saved: The saved state.

    Raises:
        ValueError: If the state is not that of a sparse optimizer.
    """

    holds_rows = False

    def __init__(self, optimizer: torch.optim.Optimizer, saved: PartState) -> None:
        self._optimizer: Any = optimizer
        self._groups, self._tables = _checked(saved.meta)
        self._histories = _histories(saved)
        self.differences: list[str] = []
        """Reasons why the state cannot be loaded."""
        self.changes: list[str] = []
        """Always empty: the state is loaded exactly as it was saved."""
        self._compare_classes(saved.meta.get("class"))
        live = {member for group in optimizer.param_groups for member in _members(group)}
        for table in sorted(live ^ self._tables.keys()):
            where = "checkpoint" if table in self._tables else "live object"
            self.differences.append(f"table {table!r} is in the {where} only")
        for group in optimizer.param_groups:
            self._compare(sorted(_members(group) & self._tables.keys()))
            for anchor in group["params"]:
                self._compare_histories([member.name for member in anchor.table.members])

    def _compare_classes(self, default: JSON) -> None:
        """Check that each table was saved with the optimizer that it has."""
        name = type(self._optimizer).__name__
        groups = self._optimizer.param_groups
        live = {member: group.get("optimizer", name) for group in groups for member in _members(group)}
        saved = {member: self._groups[group].get("optimizer", default) for member, (group, _) in self._tables.items()}
        if default != name and not any("optimizer" in group for group in (*groups, *self._groups)):
            self.differences.append(f"optimizer: checkpoint {default}, live object {name}")
            return
        self.differences += [
            f"table {table!r}, optimizer: checkpoint {saved[table]}, live object {live[table]}"
            for table in sorted(live.keys() & saved.keys())
            if saved[table] != live[table]
        ]

    def _compare(self, members: list[str]) -> None:
        """Check that tables that share a group in the optimizer were saved with the same hyperparameters."""
        for member in members[1:]:
            a, b = (self._groups[self._tables[name][0]] for name in (members[0], member))
            differ = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
            if differ:
                self.differences.append(
                    f"the tables {members[0]!r} and {member!r} share a parameter group in the live object, but differ "
                    f"in {differ} in the checkpoint"
                )

    def _compare_histories(self, members: list[str]) -> None:
        """Check that tables that share their steps in the optimizer were saved with the same steps."""
        for member in members[1:]:
            if self._histories.get(member) != self._histories.get(members[0]):
                self.differences.append(
                    f"the tables {members[0]!r} and {member!r} have one history of steps in the live object, and "
                    f"different ones in the checkpoint"
                )

    def begin(self, rows: Mapping[str, int]) -> None:
        """Do nothing, because an optimizer has no rows."""

    def check(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Do nothing, because an optimizer has no rows."""

    def load(self, name: str, columns: Mapping[str, Tensor]) -> None:
        """Do nothing, because an optimizer has no rows."""

    def end(self) -> None:
        """Set hyperparameters and step counts."""
        for group in self._optimizer.param_groups:
            for member in sorted(_members(group))[:1]:
                for key, value in self._groups[self._tables[member][0]].items():
                    group[key] = (
                        tuple(value) if isinstance(value, list) and isinstance(group.get(key), tuple) else value
                    )
            for anchor in group["params"]:
                steps = max(self._tables[member.name][1] for member in anchor.table.members)
                self._optimizer.state[anchor]["step"] = steps
                runs = self._histories.get(anchor.table.members[0].name, [])
                self._optimizer.load_history(anchor, group, runs)

    def abandon(self) -> None:
        """Do nothing, because nothing has been changed yet."""


def _histories(saved: PartState) -> dict[str, list[Run]]:
    """Return the steps recorded for each table, if its optimizer was exact."""
    found: dict[str, list[Run]] = {}
    tables = saved.meta["tables"]
    assert isinstance(tables, dict)
    for name, entry in tables.items():
        rule = entry.get("rule") if isinstance(entry, dict) else None
        if rule is None:
            continue
        numbers = saved.tensors.get(_HISTORY + name)
        if rule not in RULES or numbers is None or numbers.dim() != 2 or numbers.size(1) < 4:
            raise ValueError(f"table {name!r} must have the steps of a known rule, got {rule!r}")
        runs = [Run.of(RULES[rule], row) for row in numbers.tolist()]
        ends = [run.step + run.steps for run in runs]
        if any(run.step < 1 or run.steps < 1 for run in runs) or ends[:-1] != [run.step for run in runs[1:]]:
            raise ValueError(f"table {name!r}: its recorded steps must be consecutive")
        found[name] = runs
    return found


def _members(group: Mapping[str, Any]) -> set[str]:
    return {member.name for anchor in group["params"] for member in anchor.table.members}


def _settings(group: Mapping[str, Any]) -> dict[str, JSON]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in group.items() if key != "params"}


def _checked(meta: Mapping[str, JSON]) -> tuple[list[dict[str, Any]], dict[str, tuple[int, int]]]:
    """Return the groups, and the group number and step count of each table."""
    groups, tables = meta.get("groups"), meta.get("tables")
    if not isinstance(groups, list) or not isinstance(tables, dict):
        raise ValueError(f"a sparse optimizer must have groups and tables, got {sorted(meta)}")
    settings = [group for group in groups if isinstance(group, dict)]
    if len(settings) < len(groups):
        raise ValueError("the groups of a sparse optimizer must be objects")
    found: dict[str, tuple[int, int]] = {}
    for name, entry in tables.items():
        group, step = (entry.get("group"), entry.get("step")) if isinstance(entry, dict) else (None, None)
        if type(group) is not int or not 0 <= group < len(settings) or type(step) is not int or step < 0:
            raise ValueError(
                f"table {name!r} must have a group number below {len(settings)} and a step count, got {entry!r}"
            )
        found[name] = group, step
    return settings, found
