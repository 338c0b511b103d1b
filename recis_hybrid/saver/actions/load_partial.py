"""Loads selected tables and tensors of a checkpoint into live objects, possibly of another model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from recis_hybrid.checkpointing import SaveableTables, TableState, tables_apart
from recis_hybrid.saver.actions.selection import Loaded, Selection
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from recis_hybrid.saver.errors import CheckpointError, CheckpointMismatch
from recis_hybrid.saver.format.manifest import MANIFEST, TableEntry, TensorSpec
from recis_hybrid.saver.parts.adapters import ModulePart
from recis_hybrid.saver.parts.frozen_weights import read_frozen, specs_in_files
from recis_hybrid.saver.parts.module_names import own_names
from recis_hybrid.saver.parts.optimizer_part import OptimizerPart, saved_parameters
from recis_hybrid.saver.parts.part import Part, SaveablePart
from recis_hybrid.saver.runtime.ranks import Ranks


def load_some(
    checkpoint: StoredCheckpoint, ranks: Ranks, parts: Mapping[str, Part], selection: Selection, strict: bool
) -> Loaded:
    """Load the selected tables and tensors.

    Only files of selected tables are read. Everything is verified and compared before anything is changed.

    Args:
        checkpoint: Checkpoint to load from; it has all parts, of the same kinds.
        ranks: This rank and the others; each loads the rows of its buckets.
        parts: Parts to load into: modules, optimizers, and Saveables that support loading some tables.
        selection: The selected names, and their names in the live objects.
        strict: Whether each selected name must have a counterpart with the same dtypes and shapes.

    Returns:
        Names that were loaded, and those that were not.

    Raises:
        CorruptCheckpoint: A file has changed.
        CheckpointMismatch: Strict, and something selected does not fit.
        CheckpointError: A part does not support partial loading, or a pattern matches no name.
    """
    result = Loaded(checkpoint.manifest.step)
    actions: list[Callable[[], None]] = []

    def prepare() -> None:
        saved: list[str] = []
        live: list[str] = []
        dense: dict[str, Mapping[str, Tensor]] = {}
        optimizers: dict[str, _SavedOptimizer] = {}
        for name, part in parts.items():
            live += _live_names(name, part)
            if isinstance(part, ModulePart):
                dense[name] = _tensors(checkpoint, name, part, selection, strict)
            elif isinstance(part, OptimizerPart):
                optimizers[name] = _SavedOptimizer(checkpoint, name)
                saved += [own for _, own in optimizers[name].parameters]
            saved += dense.get(name, checkpoint.manifest.parts[name].tables)
        selection.refuse_unmatched(str(checkpoint.directory), saved, live)
        for name, part in parts.items():
            if isinstance(part, ModulePart):
                actions.append(prepare_tensors(f"{name}: ", part.module, dense[name], selection, result))
            elif isinstance(part, OptimizerPart):
                actions.append(_prepare_optimizer(name, part, optimizers[name], selection, result))
            else:
                assert isinstance(part, SaveablePart)
                actions.append(_prepare_tables(checkpoint, ranks, name, part, selection, strict, result))
        if strict:
            result.refuse(str(checkpoint.directory))

    ranks.together(prepare)
    for act in actions:
        act()
    return result


def _tensors(
    checkpoint: StoredCheckpoint, name: str, part: ModulePart, selection: Selection, strict: bool
) -> Mapping[str, Tensor]:
    """Return the tensors of a module, including frozen parameters in files if any of them is selected."""
    state, where = checkpoint.read(name), f"{checkpoint.directory / MANIFEST}: part {name!r}"
    if not selection.live_names(specs_in_files(where, state.meta)):
        return state.tensors
    try:
        return state.tensors | read_frozen(where, state.meta, part.module)
    except CheckpointMismatch:
        if strict:
            raise
        return state.tensors


def _live_names(name: str, part: Part) -> Iterable[str]:
    """Return the names of a live object's tables or tensors.

    Raises:
        CheckpointError: The object does not support partial loading.
    """
    if isinstance(part, ModulePart):
        return live_tensors(part.module)
    if isinstance(part, SaveablePart):
        return _owner(name, part).checkpoint_layout().tables
    if isinstance(part, OptimizerPart):
        if part.names is None:
            raise CheckpointError(
                f"Saver.load_some: part {name!r}: the parameters of the optimizer have no names, because their modules "
                "are not among the parts. Pass them, such as {'model': model, 'optimizer': optimizer}."
            )
        return [own for _, own in part.specs]
    raise CheckpointError(
        f"Saver.load_some: part {name!r} is of kind {part.kind}, which cannot be loaded partially. Load it with "
        "Saver.load."
    )


def _owner(name: str, part: SaveablePart) -> SaveableTables:
    if part.tables is None:
        raise CheckpointError(
            f"Saver.load_some: part {name!r} ({type(part.value).__name__}) has no load_checkpoint_tables, which "
            "loading some tables requires. Load all of it with Saver.load."
        )
    return part.tables


def live_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers by their names in checkpoints."""
    with tables_apart():
        state = module.state_dict(keep_vars=True)
    return {name: state[own] for name, own in own_names(module).items() if isinstance(state[own], Tensor)}


def prepare_tensors(
    prefix: str, module: torch.nn.Module, tensors: Mapping[str, Tensor], selection: Selection, result: Loaded
) -> Callable[[], None]:
    """Compare tensors with a module's parameters and buffers.

    Args:
        prefix: Prefix of the names in the result.
        module: Module to load into.
        tensors: Tensors of the checkpoint, by name.
        selection: Selects tensors.
        result: Receives the names that fit, and those that do not.

    Returns:
        A function that copies the tensors that fit and converts their dtypes.
    """
    live = live_tensors(module)
    names = selection.live_names(tensors)
    fitting: list[tuple[Tensor, Tensor]] = []
    for name, saved in names.items():
        if name not in live:
            result.unused.append(f"{prefix}{saved}")
        elif live[name].shape != tensors[saved].shape:
            a, b = TensorSpec.of(tensors[saved]), TensorSpec.of(live[name])
            result.unfit.append(f"{prefix}{name}: checkpoint {a}, live object {b}")
        else:
            fitting.append((live[name], tensors[saved]))
            result.loaded.append(f"{prefix}{name}")
    result.missing.extend(f"{prefix}{name}" for name in live if name not in names and selection.takes(name))

    def copy() -> None:
        with torch.no_grad():
            for own, value in fitting:
                own.copy_(value)

    return copy


class _SavedOptimizer:
    """The state of an optimizer in a checkpoint, by name of the parameter."""

    def __init__(self, checkpoint: StoredCheckpoint, name: str) -> None:
        where = f"{checkpoint.directory / MANIFEST}: part {name!r}"
        self.state = checkpoint.read(name)
        found = saved_parameters(where, self.state)
        if found is None:
            raise CheckpointError(
                f"{where}: the parameters of the optimizer have no names, because it was saved without its modules or "
                "by an earlier version. Load it with Saver.load, or save it again together with its modules."
            )
        self.parameters = found
        """Index, and dtype and shape."""


def _prepare_optimizer(
    name: str, part: OptimizerPart, saved: _SavedOptimizer, selection: Selection, result: Loaded
) -> Callable[[], None]:
    """Compare the parameters of an optimizer, by the names of each module, and return a function that loads those."""
    if different := part.class_differences(saved.state):
        result.unfit.extend(f"{name}: {text}" for text in different)
        return lambda: None
    specs = part.specs
    index_of = {key: index for index, key in enumerate(specs)}
    indices: dict[int, int] = {}
    for module in dict.fromkeys(key[0] for key in (*saved.parameters, *specs)):
        names = selection.live_names(own for key, own in saved.parameters if key == module)
        for own, old in names.items():
            index, spec = saved.parameters[module, old]
            if (module, own) not in specs:
                result.unused.append(f"{name}: {module}.{old}")
            elif specs[module, own] != spec:
                result.unfit.append(f"{name}: {module}.{own}: checkpoint {spec}, live object {specs[module, own]}")
            else:
                indices[index_of[module, own]] = index
                result.loaded.append(f"{name}: {module}.{own}")
        live = [own for key, own in specs if key == module]
        result.missing.extend(f"{name}: {module}.{own}" for own in live if own not in names and selection.takes(own))
    return lambda: part.load_parameters(saved.state, indices)


def _prepare_tables(
    checkpoint: StoredCheckpoint,
    ranks: Ranks,
    name: str,
    part: SaveablePart,
    selection: Selection,
    strict: bool,
    result: Loaded,
) -> Callable[[], None]:
    owner, entry = _owner(name, part), checkpoint.manifest.parts[name]
    live = owner.checkpoint_layout().tables
    names = selection.live_names(entry.tables)
    fitting: dict[str, str] = {}
    for live_name, saved in names.items():
        if live_name not in live:
            result.unused.append(f"{name}: {saved}")
            continue
        difference = _difference(entry.tables[saved], live[live_name], strict)
        if difference:
            result.unfit.append(f"{name}: table {live_name}: {difference}")
        else:
            fitting[live_name] = saved
            result.loaded.append(f"{name}: {live_name}")
    result.missing.extend(f"{name}: {table}" for table in live if table not in names and selection.takes(table))
    if strict and (result.missing or result.unused or result.unfit):
        return lambda: None
    tables = set(fitting.values())
    # The buckets of this rank depend on the live name of a table.
    live_names = {saved: live_name for live_name, saved in fitting.items()}
    state = checkpoint.read(name, tables, wanted=lambda table: part.buckets(live_names[table], ranks))
    states, steps = state.tables, state.meta.get("steps")

    def load() -> None:
        loaded = {}
        for live_name, saved in fitting.items():
            rows, live_columns = states.pop(saved), live[live_name].columns
            columns = {column: values for column, values in rows.columns.items() if column in live_columns}
            step = steps.get(saved) if isinstance(steps, dict) else None
            if type(step) is not int or not 0 <= step < 1 << 40:
                step = None
            loaded[live_name] = TableState(columns, rows.buckets, rows.meta | {"step": step})
        owner.load_checkpoint_tables(loaded)

    return load


def _state_columns(table: TableEntry) -> set[object]:
    fields = table.meta.get("optimizer_state")
    return {field[0] for field in fields if isinstance(field, list) and field} if isinstance(fields, list) else set()


def _difference(saved: TableEntry, live: TableState, strict: bool) -> str | None:
    """Return how columns differ, or None. Unless strict, dtypes may differ and either side may lack columns.

    A live table without optimizer state, such as a read-only one, never needs that of the checkpoint.
    """
    own = {column: TensorSpec.of(values, skip=1) for column, values in live.columns.items()}
    common = [column for column in saved.columns if column in own]
    unneeded = _state_columns(saved) if live.meta.get("optimizer_state") == [] else set()
    if strict and saved.columns.keys() - unneeded != own.keys():
        return f"checkpoint has the columns {list(saved.columns)}, live object {list(own)}"
    if common[:2] != list(own)[:2]:
        return f"checkpoint must have the columns {list(own)[:2]}, it has {list(saved.columns)}"
    for column in common:
        a, b = saved.columns[column], own[column]
        if a.shape != b.shape or (strict and a.dtype != b.dtype):
            return f"column {column}: checkpoint {a}, live object {b}"
    return None
