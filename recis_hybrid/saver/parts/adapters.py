"""Adapters for the objects that a user passes to the saver."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recis_hybrid.checkpointing import PartState, Saveable, tables_apart
from recis_hybrid.saver.errors import OTHER_STEP, CheckpointError, CorruptCheckpoint
from recis_hybrid.saver.format.json_values import checked_json
from recis_hybrid.saver.format.manifest import KINDS, TensorSpec
from recis_hybrid.saver.parts.compare import named_differences, refuse_differences
from recis_hybrid.saver.parts.frozen_weights import KEY, read_frozen, specs_in_files, without_frozen
from recis_hybrid.saver.parts.module_names import own_names, without_wrappers
from recis_hybrid.saver.parts.optimizer_part import Name, OptimizerPart
from recis_hybrid.saver.parts.part import Part, SaveablePart
from recis_hybrid.saver.parts.per_rank import PerRank
from recis_hybrid.saver.parts.stateful_part import GeneratorPart, Stateful, StatefulPart


def parts_of(values: Mapping[str, object], *, save_frozen: bool = True) -> dict[str, Part]:
    """Return the adapters of values.

    Args:
        values: Objects that the user passed, by the names of their parts. The modules among them name the parameters of
            the optimizers among them.
        save_frozen: Whether to save the frozen parameters of modules that are still as in the files they came from.

    Returns:
        The adapters. An object that is both a Saveable and a module is treated as a Saveable.

    Raises:
        CheckpointError: A value cannot be saved.
    """
    values = {name: value.value if isinstance(value, PerRank) else value for name, value in values.items()}
    names: dict[int, Name] = {}
    for part, value in sorted(values.items()):
        if isinstance(value, torch.nn.Module):
            parameters = dict(value.named_parameters())
            for own, parameter in zip(without_wrappers(value, list(parameters)), parameters.values(), strict=True):
                names.setdefault(id(parameter), (part, own))
    return {name: _part_of(name, value, names, save_frozen) for name, value in values.items()}


def _part_of(name: str, value: object, names: Mapping[int, Name], save_frozen: bool) -> Part:
    if isinstance(value, Saveable) and not isinstance(value, type):
        part = SaveablePart(value)
        if part.kind not in KINDS:
            raise CheckpointError(
                f"Saver: part {name!r}: checkpoint_kind must be one of {list(KINDS)}, got {part.kind!r}. Omit it."
            )
        return part
    if isinstance(value, torch.nn.Module):
        return ModulePart(name, value, save_frozen=save_frozen)
    if isinstance(value, torch.optim.Optimizer):
        return OptimizerPart(name, value, names)
    if value is None or isinstance(value, bool | int | float | str | list | dict):
        return JsonPart(name, value)
    if isinstance(value, torch.Generator):
        return GeneratorPart(value)
    if isinstance(value, Stateful) and not isinstance(value, type):
        return StatefulPart(name, value)
    raise CheckpointError(
        f"Saver: part {name!r} must be a Saveable (checkpoint_state, load_checkpoint_state), a torch.nn.Module, a "
        f"torch.optim.Optimizer, a torch.Generator, an object with state_dict and load_state_dict, or JSON, got "
        f"{type(value).__name__}. Wrap it in one of these."
    )


class ModulePart(Part):
    """A module, by its state_dict: tensors under their names, other values (extra state) as JSON.

    Names omit the wrappers of DistributedDataParallel and torch.compile, so that a module can be loaded on any number
    of ranks, compiled or not. Tables within the module are omitted: their engine is a separate part.
    """

    kind = "module"

    def __init__(self, name: str, module: torch.nn.Module, *, save_frozen: bool = True) -> None:
        self._name = name
        self._save_frozen = save_frozen
        self._from_files: dict[str, Tensor] = {}
        self.module = module

    def state(self) -> PartState:
        """Return parameters and buffers, detached."""
        tensors: dict[str, Tensor] = {}
        other: dict[str, object] = {}
        entries = self._entries()
        files = [] if self._save_frozen else without_frozen(self.module, entries)
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[key] = value.detach()
            else:
                other[key] = value
        extra = checked_json(f"Saver.save: part {self._name!r}, extra state of the module", other)
        return PartState(tensors=tensors, meta={"extra": extra, **({KEY: files} if files else {})})

    def check(self, where: str, saved: PartState) -> None:
        """Compare names, dtypes and shapes of parameters and buffers, and names of extra state.

        Parameters that the checkpoint leaves out are read from the files that they came from.
        """
        extra = _extra(where, saved)
        live = {k: TensorSpec.of(v) if isinstance(v, Tensor) else "extra state" for k, v in self._entries().items()}
        specs = specs_in_files(where, saved.meta) | {k: TensorSpec.of(v) for k, v in saved.tensors.items()}
        refuse_differences(where, named_differences("tensor", specs | dict.fromkeys(extra, "extra state"), live))
        self._from_files = read_frozen(where, saved.meta, self.module)

    def load(self, saved: PartState) -> None:
        """Copy into the parameters and buffers, which stay the same tensors."""
        own = own_names(self.module)
        state = {**saved.tensors, **self._from_files, **_extra("the module", saved)}
        self._from_files = {}
        with tables_apart():
            self.module.load_state_dict({own[name]: value for name, value in state.items()})

    def _entries(self) -> dict[str, object]:
        lazy = [k for k, p in self.module.named_parameters() if torch.nn.parameter.is_lazy(p)]
        lazy += [k for k, b in self.module.named_buffers() if torch.nn.parameter.is_lazy(b)]
        if lazy:
            raise CheckpointError(
                f"Saver: part {self._name!r}: parameters and buffers must be initialized, {lazy} are not. Run the "
                "module once on a batch."
            )
        with tables_apart():
            state = self.module.state_dict()
        return {name: state[own] for name, own in own_names(self.module).items()}


class JsonPart(Part):
    """A JSON value; ``Saver.read_json`` reads it back."""

    kind = "json"

    def __init__(self, name: str, value: object) -> None:
        self._name = name
        self._value = value

    def state(self) -> PartState:
        """Return the value as metadata."""
        return PartState(meta={"value": checked_json(f"Saver.save: part {self._name!r}", self._value)})

    def check(self, where: str, saved: PartState) -> None:
        """Raise CheckpointError, because there is no object to load into."""
        raise CheckpointError(f"{where} is JSON, which cannot be loaded into an object. Use Saver.read_json.")

    def load(self, saved: PartState) -> None:
        """Never called, because :meth:`check` raises."""
        raise AssertionError


def _extra(where: str, saved: PartState) -> dict[str, object]:
    extra = saved.meta.get("extra")
    if not isinstance(extra, dict):
        raise CorruptCheckpoint(f"{where}: meta.extra must be an object, got {extra!r}. {OTHER_STEP}")
    return dict(extra)
