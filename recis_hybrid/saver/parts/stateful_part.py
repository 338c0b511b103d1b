"""Objects with a ``state_dict`` (schedulers, scalers, reading positions) and torch generators as parts."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol, runtime_checkable

import torch

from recis_hybrid.checkpointing import PartState
from recis_hybrid.saver.errors import OTHER_STEP, CorruptCheckpoint
from recis_hybrid.saver.format.manifest import TensorSpec
from recis_hybrid.saver.parts.compare import named_differences, refuse_differences
from recis_hybrid.saver.parts.part import Part
from recis_hybrid.saver.parts.state_tree import pack, unpack


@runtime_checkable
class Stateful(Protocol):
    """An object that returns and accepts its state, as many classes of torch do."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Replace the state."""
        ...


class StatefulPart(Part):
    """A ``Stateful``."""

    kind = "stateful"

    def __init__(self, name: str, value: Stateful) -> None:
        self._name = name
        self._value = value

    def state(self) -> PartState:
        """Return the tensors in the state_dict; everything else as JSON."""
        tensors: dict[str, torch.Tensor] = {}
        packed = pack(f"Saver.save: part {self._name!r}", self._value.state_dict(), tensors)
        return PartState(tensors=tensors, meta={"class": type(self._value).__name__, "state": packed})

    def check(self, where: str, saved: PartState) -> None:
        """Compare the class; only the object itself can check the rest."""
        live = type(self._value).__name__
        if saved.meta.get("class") != live:
            refuse_differences(where, [f"class: checkpoint {saved.meta.get('class')}, live object {live}"])
        self._unpacked(where, saved)

    def load(self, saved: PartState) -> None:
        """Pass the state to the object."""
        self._value.load_state_dict(self._unpacked("the object", saved))

    def _unpacked(self, where: str, saved: PartState) -> dict[str, Any]:
        state = unpack(where, saved.meta.get("state"), saved.tensors)
        if not isinstance(state, dict):
            raise CorruptCheckpoint(f"{where}: meta.state must be a dictionary, got {state!r}. {OTHER_STEP}")
        # MultiStepLR has a Counter of milestones; JSON has only one kind of dictionary.
        counters = {key for key, value in self._value.state_dict().items() if isinstance(value, Counter)}
        return {key: Counter(value) if key in counters else value for key, value in state.items()}


class GeneratorPart(Part):
    """A torch.Generator."""

    kind = "generator"

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state(self) -> PartState:
        """Return the state of the generator."""
        return PartState(tensors={"state": self._generator.get_state()}, owned=True)

    def check(self, where: str, saved: PartState) -> None:
        """Compare the size of the state, which differs between generators of CPUs and GPUs."""
        live = {"state": TensorSpec.of(self._generator.get_state())}
        found = {name: TensorSpec.of(tensor) for name, tensor in saved.tensors.items()}
        refuse_differences(where, named_differences("tensor", found, live))

    def load(self, saved: PartState) -> None:
        """Set the state of the generator."""
        self._generator.set_state(saved.tensors["state"])
