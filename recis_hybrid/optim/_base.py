"""SparseOptimizer: a torch.optim.Optimizer over the anchors of tables."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from recis_hybrid import distributed, ops
from recis_hybrid.checkpointing import PartState
from recis_hybrid.embedding import Anchor, HashTable, OptimizerSpec, StateField
from recis_hybrid.embedding.compilation import outside_graphs
from recis_hybrid.ops.update import Gradients
from recis_hybrid.optim._checkpoint import OptimizerLoader, optimizer_state
from recis_hybrid.optim.exact import Run, history_of, idle, keep_history
from recis_hybrid.validation import check_flag, describe_value


@outside_graphs("step", "zero_grad", "check_tables", "update_table")
class SparseOptimizer(torch.optim.Optimizer):
    """Base class of the sparse optimizers; learning-rate schedulers work on it as on any torch optimizer.

    ``step()`` reduces the pending gradients of each table once, and updates each record in the same pass. Every table
    does a step, with or without gradients, so that step counts do not depend on coalescing. Unless its state is loaded,
    an optimizer continues from a table's step count, to which the moments in the table's rows belong. A table whose
    config has ``optimizer_overrides`` gets its own parameter group. So does a table whose config has an ``optimizer``
    of its own: the group's ``optimizer`` names the class, whose rule, state and hyperparameters the table has.
    """

    checkpoint_kind = "optimizer"
    needs_whole_rows = False
    """True if an update depends on all elements of a row, so that ranks cannot split rows by column."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(_groups(type(self).__name__, params), defaults)

    @staticmethod
    @abstractmethod
    def row_state() -> tuple[StateField, ...]:
        """Return the optimizer state of every row."""

    @classmethod
    def spec(cls, **hyperparameters: Any) -> OptimizerSpec:
        """Return this optimizer with hyperparameters, for ``EmbeddingEngine(..., optimizer=)``.

        Args:
            **hyperparameters: Arguments of the class and of its ``row_state``.

        Raises:
            TypeError: If neither accepts one of the hyperparameters.

        Example:
            >>> from recis_hybrid import optim
            >>> [field.name for field in optim.SGD.spec(lr=0.1, momentum=0.9).row_state]
            ['momentum_buffer']
        """
        of_state = set(inspect.signature(cls.row_state).parameters)
        of_class = set(cls._defaults())
        unknown = sorted(set(hyperparameters) - of_state - of_class)
        if unknown:
            raise TypeError(
                f"{cls.__name__}.spec: unknown hyperparameters {unknown}; it has {sorted(of_state | of_class)}"
            )
        row_state = cls.row_state(**{name: value for name, value in hyperparameters.items() if name in of_state})
        arguments = {name: value for name, value in hyperparameters.items() if name in of_class}
        return OptimizerSpec(cls, row_state, arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of tables; each table with ``optimizer`` or ``optimizer_overrides`` gets its own group.

        Raises:
            TypeError: If a parameter is not a table's anchor, or a table's optimizer is not one of this package.
            ValueError: If a hyperparameter is out of range or unknown to a table's optimizer, or the rows lack the
                state that it needs.
        """
        for group in _split(type(self), param_group, self.defaults):
            kind = _kind_of(type(self), group["params"][0])
            merged = {**self.defaults, **group}
            kind._check(merged)
            for anchor in merged["params"]:
                kind._check_layout(anchor, merged)
                kind._check_exact(anchor, merged)
            super().add_param_group(group)
            for anchor in merged["params"]:
                keep_history(anchor.table, bool(merged.get("exact")))
            if "optimizer" in group:  # torch has added this class's hyperparameters
                for name in self.defaults.keys() - kind._defaults().keys():
                    del group[name]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned.

        Raises:
            ValueError: If the tables of a group had another optimizer of their own, or the groups differ otherwise.
        """
        kinds = [
            [group.get("optimizer") for group in groups] for groups in (state_dict["param_groups"], self.param_groups)
        ]
        for number, (saved, own) in enumerate(zip(*kinds, strict=False)):
            if saved != own:
                name = type(self).__name__
                raise ValueError(
                    f"{name}: parameter group {number} has the optimizer {own or name}, the state_dict has "
                    f"{saved or 'none of its own'}; build the engine with the optimizers that were saved"
                )
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for anchor in group["params"]:
                runs = self.state[anchor].pop("history", [])
                self.load_history(anchor, group, [Run.of(kind, rest) for kind, *rest in runs])

    def state_dict(self) -> dict[str, Any]:
        """Return hyperparameters, steps, and the history of each table with ``exact=True``."""
        found = super().state_dict()
        anchors = [anchor for group in self.param_groups for anchor in group["params"]]
        for number, anchor in enumerate(anchors):
            history = history_of(anchor.table)
            if history is not None and number in found["state"]:
                runs = [[run.kind, *run.numbers()] for run in history.runs]
                found["state"][number] = {**found["state"][number], "history": runs}
        return found

    def load_history(self, anchor: Anchor, group: dict[str, Any], runs: Sequence[Run]) -> None:
        """Keep or end the history of a table, as its group says, and replace it by saved steps if there are any."""
        table = anchor.table
        keep_history(table, bool(group.get("exact")))
        history = history_of(table)
        if runs and history is not None:
            rule = _kind_of(type(self), anchor)._rule(table, group)
            assert rule is not None, "_check_exact has refused optimizers without a rule"
            history.load(table, rule, runs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.param_groups = [_Group(group) if "optimizer" in group else group for group in self.param_groups]
        for group in self.param_groups:  # saved before some hyperparameters existed
            kind = _kind_of(type(self), group["params"][0])
            for name, value in kind._defaults().items():
                group.setdefault(name, value)

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Return the default hyperparameters of the class."""
        parameters = inspect.signature(cls).parameters
        return {name: parameter.default for name, parameter in parameters.items() if name != "params"}

    @classmethod
    def _check_layout(cls, anchor: Anchor, group: dict[str, Any]) -> None:
        layout = anchor.table.layout
        if cls.needs_whole_rows and layout.whole_dim is not None:
            raise ValueError(
                f"{cls.__name__} needs whole rows, but those of the table {anchor.table.name} are split by column over "
                f"ranks: build it with EmbeddingConfig(sharding='row')"
            )
        available = {field.name: (layout.width(field.name), layout.part_dtype(field.name)) for field in layout.state}
        fields = cls._needed(group)
        required = {field.name: (field.width or layout.dim, field.dtype or layout.state_dtype) for field in fields}
        if not anchor.table.read_only and any(available.get(name) != form for name, form in required.items()):
            owner = "EmbeddingEngine" if anchor.table.optimizer is None else "EmbeddingConfig"
            raise ValueError(
                f"{cls.__name__} needs {required} in every row of the table {anchor.table.name}, but the engine was "
                f"built with {available}: build it with {owner}(..., optimizer=optim.{cls.__name__}"
                f"{cls._spec_call(group)})"
            )

    @classmethod
    def _check_exact(cls, anchor: Anchor, group: dict[str, Any]) -> None:
        """Raise TypeError unless ``exact`` is a bool, and ValueError if rows cannot catch up with this optimizer."""
        check_flag(cls.__name__, "exact", group.get("exact", False))
        if group.get("exact") and not anchor.table.read_only:
            rule = cls._rule(anchor.table, group)
            if rule is None or idle(rule.kind, rule.values) is None:
                raise ValueError(
                    f"{cls.__name__}: exact=True is not available, because rows cannot catch up on steps of this "
                    f"optimizer; use exact=False, or another one, e.g. AdamW"
                )

    @classmethod
    @abstractmethod
    def _check(cls, group: dict[str, Any]) -> None:
        """Raise ValueError for a hyperparameter that is out of range."""

    @classmethod
    def _needed(cls, group: dict[str, Any]) -> tuple[StateField, ...]:
        """Return the row state that these hyperparameters require."""
        return cls.row_state()

    @staticmethod
    def _spec_call(group: dict[str, Any]) -> str:
        """Return source text of the call to ``spec`` that these hyperparameters need; empty if the class suffices."""
        return ""

    @classmethod
    def _update(
        cls, table: HashTable, records: ops.update.Table, gradients: Gradients, group: dict[str, Any], step: int
    ) -> None:
        """Apply the gradients of one step to a table; ``step`` counts from 1."""
        rule = cls._rule(table, group)
        assert rule is not None, f"{cls.__name__} has neither a rule nor an update of its own"
        ops.update.update_rows(records, gradients, rule, step)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every table.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, if there is a closure.

        Raises:
            RuntimeError: If several ranks train together, but this rank built its tables alone, or nothing synchronizes
                the towers.
        """
        self._refuse_unshared()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        anchors = [anchor for group in self.param_groups for anchor in group["params"]]
        HashTable.announce_gradients(anchor.table for anchor in anchors if not anchor.table.read_only)
        for group in self.param_groups:
            for anchor in group["params"]:
                table = anchor.table
                if not table.read_only:
                    self._step(anchor, table.pending_gradients(), group)
                    table.clear_gradients()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all pending gradients."""
        for group in self.param_groups:
            for anchor in group["params"]:
                anchor.grad = None

    def checkpoint_state(self) -> PartState:
        """Return hyperparameters and steps by member table, in the form that Saver writes."""
        return optimizer_state(self)

    def checkpoint_loader(self, saved: PartState) -> OptimizerLoader:
        """Return a loader for saved state, even of tables that were coalesced differently."""
        return OptimizerLoader(self, saved)

    def load_checkpoint_state(self, state: PartState) -> None:
        """Load the state that :meth:`checkpoint_state` returned.

        Raises:
            ValueError: If the state belongs to other tables or another optimizer; nothing is changed.
        """
        loader = OptimizerLoader(self, state)
        if loader.differences:
            raise ValueError(f"{type(self).__name__}: {'; '.join(loader.differences)}")
        loader.end()

    def check_tables(self, anchors: Sequence[Tensor]) -> None:
        """Check the tables of a step without autograd, before :meth:`update_table` changes any.

        Raises:
            RuntimeError: See :meth:`step`.
            ValueError: If a table is not among the optimizer's parameters.
        """
        self._refuse_unshared()
        for anchor in anchors:
            self._group_of(anchor)

    def update_table(self, anchor: Tensor, gradients: Gradients) -> None:
        """Do one step on a table; ``EmbeddingEngine.apply_gradients`` calls this."""
        self._step(anchor, gradients, self._group_of(anchor))

    def rule(self, anchor: Tensor) -> tuple[ops.update.Rule, int]:
        """Return the rule of the next steps on a table as plain data, and the number of steps done.

        Raises:
            TypeError: If the table's optimizer cannot be written as such a rule.
            ValueError: If the table is not among the optimizer's parameters.
        """
        self.check_tables([anchor])
        kind, table = _kind_of(type(self), anchor), anchor.table  # type: ignore[attr-defined]
        group = self._group_of(anchor)
        if group.get("exact"):
            raise TypeError(
                f"{kind.__name__} with exact=True cannot update tables inside jax.jit; use exact=False, or "
                "bridge.jax_led.JaxTables outside jit"
            )
        rule = kind._rule(table, group)
        if rule is None:
            raise TypeError(
                f"{kind.__name__} cannot update tables inside jax.jit; use an optimizer of recis_hybrid.optim, "
                "or bridge.jax_led.JaxTables outside jit"
            )
        return rule, self.state[anchor].get("step", table.step)

    def count_steps(self, anchor: Tensor, steps: int) -> None:
        """Count steps that another program has done on a table by :meth:`rule`."""
        table, state = anchor.table, self.state[anchor]  # type: ignore[attr-defined]
        if steps:
            state["step"] = state.get("step", table.step) + steps
            table.step += steps

    @classmethod
    def _rule(cls, table: HashTable, group: dict[str, Any]) -> ops.update.Rule | None:
        """Return the rule of a table as plain data; None if its update is Python."""
        return None

    def _group_of(self, anchor: Tensor) -> dict[str, Any]:
        group = next((g for g in self.param_groups if any(p is anchor for p in g["params"])), None)
        if group is None:
            table = getattr(anchor, "table", None)
            names = ", ".join(repr(member.name) for member in table.members) if table is not None else repr(anchor)
            raise ValueError(
                f"{type(self).__name__}: the table {names} is not among the optimizer's parameters; pass it "
                f"engine.parameters(), i.e. all tables that are trained"
            )
        return group

    def _refuse_unshared(self) -> None:
        """Raise RuntimeError if each rank is about to train a separate model."""
        if distributed.world_size() == 1:
            return
        name = type(self).__name__
        distributed.check_gradients_averaged(name)
        for group in self.param_groups:
            for anchor in group["params"]:
                if anchor.table.built_alone and not anchor.table.read_only:
                    tables = ", ".join(member.name for member in anchor.table.members)
                    raise RuntimeError(
                        f"{name}: the table {tables} was built before torch.distributed was initialized, so that each "
                        f"of {distributed.world_size()} ranks has its own table; call init_process_group before "
                        f"building the EmbeddingEngine, or build it with group=False if this is intended"
                    )

    def _step(self, anchor: Any, gradients: Gradients | None, group: dict[str, Any]) -> None:
        """Do a step on a table: update its rows if there are gradients, and count the step."""
        table, state = anchor.table, self.state[anchor]
        # A new optimizer continues from the table's step count, to which the moments in its rows belong.
        step = state.get("step", table.step) + 1
        if gradients is not None:
            records, gradients = table.records(gradients)
            _kind_of(type(self), anchor)._update(table, records, gradients, group, step)
        if (history := history_of(table)) is not None:
            rule = _kind_of(type(self), anchor)._rule(table, group)
            assert rule is not None, "_check_exact has refused optimizers without a rule"
            history.record(table, rule, step)
        state["step"] = step
        table.step += 1


def rule_of(table: HashTable, kind: str, state: Sequence[str], *values: float) -> ops.update.Rule:
    """Return a rule of ``csrc/core/rules``.

    Args:
        table: The table.
        kind: A key of ``ops.update.RULES``.
        state: Names of the state fields of a row, in the order of the rule's offsets.
        *values: Hyperparameters, in the rule's order.
    """
    return ops.update.Rule(ops.update.RULES[kind], [table.layout.offset(name) for name in state], list(values))


def _groups(owner: str, params: Iterable[Any]) -> list[dict[str, Any]]:
    if isinstance(params, Tensor | dict | str) or not isinstance(params, Iterable):
        raise TypeError(
            f"{owner}: params must be engine.parameters(), or a list of groups of them, got {describe_value(params)}"
        )
    groups = list(params)
    return groups if groups and isinstance(groups[0], dict) else [{"params": groups}]


class _Group(dict[str, Any]):
    """The parameter group of a table with an optimizer of its own."""

    def __missing__(self, key: str) -> Any:
        """Raise KeyError for a hyperparameter, such as the momentum that some schedules set."""
        raise KeyError(
            f"{self['optimizer']}, the optimizer of the table {self['params'][0].table.name}, has no {key!r}; use a "
            f"schedule of the learning rate only, e.g. with cycle_momentum=False"
        )


def _kind_of(default: type[SparseOptimizer], anchor: Any) -> type[SparseOptimizer]:
    """Return the optimizer class of a table: that of its config, or the default."""
    spec = anchor.table.optimizer
    return default if spec is None else spec.make


def _split(kind: type[SparseOptimizer], group: dict[str, Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a parameter group: a separate group for each table with ``optimizer`` or ``optimizer_overrides``."""
    owner = kind.__name__
    if "params" not in group:
        raise ValueError(
            f"{owner}: a parameter group must have 'params', e.g. engine.parameters(), got {sorted(group)}"
        )
    params = group["params"]
    anchors: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    for number, anchor in enumerate(anchors):
        if not isinstance(anchor, Anchor):
            got = f"shape {list(anchor.shape)}" if isinstance(anchor, Tensor) else f"a {type(anchor).__name__}"
            raise TypeError(
                f"{owner}: parameter {number} ({got}) is not an embedding table's anchor; "
                f"pass engine.parameters() here, and embedding.dense_parameters(model) to torch.optim"
            )
    common = [anchor for anchor in anchors if not anchor.table.overrides and anchor.table.optimizer is None]
    result = [{**group, "params": common}] if common else []
    for anchor in anchors:
        spec, overrides = anchor.table.optimizer, anchor.table.overrides
        if spec is not None:
            result.append(_own_group(anchor, group, defaults))
        elif overrides:
            _refuse_unknown(owner, anchor, overrides, defaults)
            result.append({**group, **overrides, "params": [anchor]})
    return result


def _own_group(anchor: Anchor, group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the group of a table with an optimizer of its own.

    Args:
        anchor: The table's anchor.
        group: The group that the caller passed; what it sets explicitly takes precedence over the class's defaults.
        defaults: Hyperparameters of the optimizer that the caller builds, which do not apply to the table.
    """
    table = anchor.table
    assert table.optimizer is not None
    kind = table.optimizer.make
    if not isinstance(kind, type) or not issubclass(kind, SparseOptimizer):
        raise TypeError(
            f"the table {table.name}: EmbeddingConfig(optimizer=) must be an optimizer of recis_hybrid.optim, got "
            f"{describe_value(kind)}"
        )
    own = kind._defaults()
    _refuse_unknown(kind.__name__, anchor, table.overrides, own)
    foreign = sorted((group.keys() & defaults.keys()) - own.keys())
    if foreign:
        raise ValueError(
            f"the table {table.name} has the optimizer {kind.__name__}, which has no hyperparameter {foreign}, but its "
            f"parameter group sets it; pass the table in another group, or set EmbeddingConfig(optimizer=)"
        )
    settings = {**own, **group, **table.optimizer.hyperparameters, **table.overrides}
    return _Group({**settings, "optimizer": kind.__name__, "params": [anchor]})


def _refuse_unknown(owner: str, anchor: Anchor, overrides: dict[str, Any], known: dict[str, Any]) -> None:
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(
            f"{owner} has no hyperparameter {unknown}, which the config of the table {anchor.table.name} sets; "
            f"it has {sorted(known)}"
        )
