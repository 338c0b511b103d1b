"""torch optimizers as a part: state tensors as tensors, scalars and parameter groups as JSON.

Names on disk: ``state.3.exp_avg`` belongs to the parameter with index 3, counted through the groups, and
``groups.0.lr`` is a tensor hyperparameter of group 0. ``meta.names`` has the name of each parameter: that of the module
part that it belongs to, and its name in the module. Parameters are matched by these names. Checkpoints without them, or
optimizers whose modules are not among the parts, are matched by order, as in torch's own state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from recis_hybrid.checkpointing import JSON, PartState
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.json_values import checked_object
from recis_hybrid.saver.format.manifest import TensorSpec
from recis_hybrid.saver.parts.compare import named_differences, refuse_differences
from recis_hybrid.saver.parts.part import Part

Name: TypeAlias = "tuple[str, str]"
"""Name of a parameter: the module's part, and its name in the module."""


class OptimizerPart(Part):
    """An optimizer, restored bit for bit, including its step counts.

    Args:
        name: Name of the part, for messages.
        optimizer: The optimizer.
        names: Names of parameters, by their ``id()``.
    """

    kind = "optimizer"

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, names: Mapping[int, Name] | None = None) -> None:
        self._name = name
        self._optimizer = optimizer
        self._names_by_id = names or {}

    def state(self) -> PartState:
        """Return the state tensors; everything else as JSON."""
        packed = self._optimizer.state_dict()
        where = f"Saver.save: part {self._name!r}"
        tensors: dict[str, Tensor] = {}
        state: dict[str, JSON] = {}
        for index, values in packed["state"].items():
            if type(index) is not int:
                raise CheckpointError(f"{where}: optimizer state must belong to parameters, got the key {index!r}.")
            state[str(index)] = _split(f"{where}, state of parameter {index}", f"state.{index}.", values, tensors)
        groups: list[JSON] = []
        for number, group in enumerate(packed["param_groups"]):
            values = {key: list(v) if isinstance(v, tuple) else v for key, v in group.items() if key not in _PARAMETERS}
            groups.append(_split(f"{where}, parameter group {number}", f"groups.{number}.", values, tensors))
        return PartState(tensors=tensors, meta={**self._identity(), "groups": groups, "state": state})

    def check(self, where: str, saved: PartState) -> None:
        """Compare the class, the groups, and the dtypes and shapes of the parameters, by name or else in order."""
        differences = self.class_differences(saved)
        found, own = _parameters(where, saved.meta), _parameters(where, self._identity())
        names, live = _names(where, saved.meta), self.names
        _, groups = _unpack(where, saved)
        if names is None or live is None:
            differences += _differences_in_order(found, own)
        else:
            differences += named_differences("parameter", _dotted(_by_name(names, found)), _dotted(_by_name(live, own)))
            differences += _group_differences(names, live, groups)
        refuse_differences(where, differences)

    def load(self, saved: PartState) -> None:
        """Load hyperparameters and state; tensors are moved to the devices of their parameters."""
        state, groups = _unpack("the optimizer", saved)
        names, live = _names("the optimizer", saved.meta), self.names
        packed = self._optimizer.state_dict()["param_groups"]
        if names is not None and live is not None:
            group_of = {name: number for number, group in enumerate(names) for name in group}
            index_of = {name: index for index, name in enumerate(_flat(names))}
            state = {n: state[index_of[name]] for n, name in enumerate(_flat(live)) if index_of[name] in state}
            groups = [
                dict(groups[group_of[group[0]]] if group else own) for group, own in zip(live, packed, strict=True)
            ]
        for group, own, kept in zip(groups, self._optimizer.param_groups, packed, strict=True):
            for key, value in group.items():
                if isinstance(value, list) and isinstance(own.get(key), tuple):
                    group[key] = tuple(value)
            group.update({key: kept[key] for key in _PARAMETERS if key in kept})
        self._load(state, groups)

    def load_parameters(self, saved: PartState, indices: Mapping[int, int]) -> None:
        """Load the state of some parameters; hyperparameters and other parameters stay.

        Args:
            saved: The saved state, of an optimizer of the same class.
            indices: Index of each parameter in the checkpoint, by its index in the live object.
        """
        state, _ = _unpack("the optimizer", saved)
        packed = self._optimizer.state_dict()
        merged = {index: values for index, values in packed["state"].items() if index not in indices}
        merged |= {own: state[index] for own, index in indices.items() if index in state}
        self._load(dict(sorted(merged.items())), packed["param_groups"])

    def class_differences(self, saved: PartState) -> list[str]:
        """Return the difference in class, if there is one."""
        live = type(self._optimizer).__name__
        return [] if saved.meta.get("class") == live else [f"optimizer: {_versus(saved.meta.get('class'), live)}"]

    @property
    def names(self) -> list[list[Name]] | None:
        """Names of the parameters, by group; None if one has no name."""
        groups = [group["params"] for group in self._optimizer.param_groups]
        if not all(id(parameter) in self._names_by_id for group in groups for parameter in group):
            return None
        return [[self._names_by_id[id(parameter)] for parameter in group] for group in groups]

    @property
    def specs(self) -> dict[Name, str]:
        """Dtypes and shapes of the parameters, by name."""
        names = self.names
        return {} if names is None else _by_name(names, _parameters("the optimizer", self._identity()))

    def _load(self, state: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        # Undo torch's casts to a parameter's dtype, as of float32 moments of a bfloat16 parameter.
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for index, values in state.items():
            # An optimizer that keeps its state elsewhere (OptaxOptimizer) casts nothing.
            live = self._optimizer.state.get(parameters[index], {})
            for key, tensor in values.items():
                if isinstance(tensor, Tensor) and key in live and live[key].dtype != tensor.dtype:
                    live[key] = tensor.to(live[key].device)

    def _identity(self) -> dict[str, JSON]:
        parameters: list[JSON] = [
            [str(TensorSpec.of(parameter)) for parameter in group["params"]] for group in self._optimizer.param_groups
        ]
        identity: dict[str, JSON] = {"class": type(self._optimizer).__name__, "parameters": parameters}
        if (names := self.names) is not None:
            identity["names"] = [[list(name) for name in group] for group in names]
        return identity


_PARAMETERS = ("params", "param_names")
"""Entries of a group that identify its parameters."""


def saved_parameters(where: str, saved: PartState) -> dict[Name, tuple[int, str]] | None:
    """Return index, dtype and shape of the saved parameters by name; None if they have no names."""
    names = _names(where, saved.meta)
    if names is None:
        return None
    _unpack(where, saved)
    specs = _by_name(names, _parameters(where, saved.meta))
    return {name: (index, specs[name]) for index, name in enumerate(_flat(names))}


def _split(where: str, prefix: str, values: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, JSON]:
    """Move tensors from ``values`` to ``tensors``, and return the rest as JSON."""
    rest: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{key}"] = value.detach()
        else:
            rest[key] = value
    return checked_object(where, rest)


def _unpack(where: str, saved: PartState) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Return state by parameter index, and groups, in torch's form except for ``params`` and tuples."""
    parameters = _parameters(where, saved.meta)
    count = sum(map(len, parameters))
    try:
        state = {int(index): dict(values) for index, values in cast(dict[str, Any], saved.meta["state"]).items()}
        groups = [dict(group) for group in cast(list[Any], saved.meta["groups"])]
        for name, tensor in saved.tensors.items():
            kind, index, key = name.split(".", 2)
            {"state": state, "groups": dict(enumerate(groups))}[kind][int(index)][key] = tensor
        sound = all(0 <= index < count for index in state) and len(groups) == len(parameters)
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CorruptCheckpoint(f"{where}: groups, state and tensors of the optimizer are inconsistent. {OTHER_STEP}")
    return state, groups


def _parameters(where: str, meta: Mapping[str, JSON]) -> list[list[JSON]]:
    groups = meta.get("parameters")
    if isinstance(groups, list) and all(isinstance(group, list) for group in groups):
        return cast(list[list[JSON]], groups)
    raise CorruptCheckpoint(f"{where}: meta.parameters must be a list of lists, got {groups!r}. {OTHER_STEP}")


def _names(where: str, meta: Mapping[str, JSON]) -> list[list[Name]] | None:
    """Return the names of the saved parameters, by group; None if the checkpoint has none."""
    if "names" not in meta:
        return None
    try:
        groups = [[(part, name) for part, name in group] for group in cast(Any, meta["names"])]
        lengths = [len(group) for group in _parameters(where, meta)]
        sound = [len(group) for group in groups] == lengths and len(set(_flat(groups))) == sum(lengths)
        sound = sound and all(isinstance(text, str) for name in _flat(groups) for text in name)
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise CorruptCheckpoint(
            f"{where}: meta.names must have a part and a name for each parameter, each pair once. {OTHER_STEP}"
        )
    return groups


def _flat(groups: Sequence[Sequence[Name]]) -> list[Name]:
    return [name for group in groups for name in group]


def _by_name(names: Sequence[Sequence[Name]], specs: Sequence[Sequence[JSON]]) -> dict[Name, str]:
    return {
        name: str(spec) for group, of in zip(names, specs, strict=True) for name, spec in zip(group, of, strict=True)
    }


def _dotted(named: Mapping[Name, str]) -> dict[str, str]:
    return {".".join(name): value for name, value in named.items()}


def _versus(saved: object, live: object) -> str:
    return f"checkpoint {saved}, live object {live}"


def _differences_in_order(found: Sequence[Sequence[JSON]], own: Sequence[Sequence[JSON]]) -> list[str]:
    differences = []
    if len(found) != len(own):
        differences.append(f"parameter groups: {_versus(len(found), len(own))}")
    for number, (a, b) in enumerate(zip(found, own, strict=False)):
        if len(a) != len(b):
            differences.append(f"group {number}: checkpoint {len(a)} parameters, live object {len(b)}")
        differences += [
            f"group {number}, parameter {i}: {_versus(x, y)}"
            for i, (x, y) in enumerate(zip(a, b, strict=False))
            if x != y
        ]
    return differences


def _group_differences(
    names: Sequence[Sequence[Name]], live: Sequence[Sequence[Name]], groups: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Check that parameters that share a live group were saved with the same hyperparameters."""
    group_of = {name: number for number, group in enumerate(names) for name in group}
    differences = []
    for group in live:
        saved = [name for name in group if name in group_of]
        for name in saved[1:]:
            a, b = (groups[group_of[each]] for each in (saved[0], name))
            differ = sorted(key for key in a.keys() | b.keys() if not _equal(a.get(key), b.get(key)))
            if differ:
                differences.append(
                    f"the parameters {'.'.join(saved[0])!r} and {'.'.join(name)!r} share a parameter group in the live "
                    f"object, but differ in {differ} in the checkpoint"
                )
    return differences


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)
