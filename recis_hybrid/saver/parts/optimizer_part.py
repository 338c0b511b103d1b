"""torch optimizers as a part: state tensors as tensors, scalars and parameter groups as JSON.

Parameters are matched by their order in the groups, as in torch's own state_dict. Names on disk: ``state.3.exp_avg``
belongs to the parameter with index 3, and ``groups.0.lr`` is a tensor hyperparameter of group 0.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from recis_hybrid.checkpointing import JSON, PartState
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.json_values import checked_object
from recis_hybrid.saver.format.manifest import TensorSpec
from recis_hybrid.saver.parts.compare import refuse_differences
from recis_hybrid.saver.parts.part import Part


class OptimizerPart(Part):
    """An optimizer, restored bit for bit, including its step counts."""

    kind = "optimizer"

    def __init__(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        self._name = name
        self._optimizer = optimizer

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
            values = {key: list(v) if isinstance(v, tuple) else v for key, v in group.items() if key != "params"}
            groups.append(_split(f"{where}, parameter group {number}", f"groups.{number}.", values, tensors))
        return PartState(tensors=tensors, meta={**self._identity(), "groups": groups, "state": state})

    def check(self, where: str, saved: PartState) -> None:
        """Compare the class, the groups, and the dtypes and shapes of the parameters, in order."""
        live = self._identity()
        differences: list[str] = []
        if saved.meta.get("class") != live["class"]:
            differences.append(f"optimizer: checkpoint {saved.meta.get('class')}, live object {live['class']}")
        found, own = _parameters(where, saved.meta), _parameters(where, live)
        if len(found) != len(own):
            differences.append(f"parameter groups: checkpoint {len(found)}, live object {len(own)}")
        for number, (a, b) in enumerate(zip(found, own, strict=False)):
            if len(a) != len(b):
                differences.append(f"group {number}: checkpoint {len(a)} parameters, live object {len(b)}")
            differences += [
                f"group {number}, parameter {i}: checkpoint {x}, live object {y}"
                for i, (x, y) in enumerate(zip(a, b, strict=False))
                if x != y
            ]
        refuse_differences(where, differences)
        _unpack(where, saved)

    def load(self, saved: PartState) -> None:
        """Load hyperparameters and state; tensors are moved to the devices of their parameters."""
        state, groups = _unpack("the optimizer", saved)
        first = 0
        for group, live in zip(groups, self._optimizer.param_groups, strict=True):
            for key, value in group.items():
                if isinstance(value, list) and isinstance(live.get(key), tuple):
                    group[key] = tuple(value)
            group["params"] = list(range(first, first + len(live["params"])))
            first += len(live["params"])
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._undo_casts(state)

    def _undo_casts(self, state: dict[int, dict[str, Any]]) -> None:
        """Undo torch's casts to a parameter's dtype, as of float32 moments of a bfloat16 parameter."""
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
        return {"class": type(self._optimizer).__name__, "parameters": parameters}


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


def _parameters(where: str, meta: dict[str, JSON]) -> list[list[JSON]]:
    groups = meta.get("parameters")
    if isinstance(groups, list) and all(isinstance(group, list) for group in groups):
        return cast(list[list[JSON]], groups)
    raise CorruptCheckpoint(f"{where}: meta.parameters must be a list of lists, got {groups!r}. {OTHER_STEP}")
