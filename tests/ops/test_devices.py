"""Every operator refuses tensors on different devices, by the name of an argument, before it changes a map."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.ops import (
    test_blocks,
    test_cache,
    test_hash,
    test_id_map,
    test_program,
    test_ragged,
    test_sketch,
    test_transform,
    test_update,
)
from tests.ops.test_operators import HOST_ONLY, OPERATORS

Call = tuple[Any, tuple[Any, ...]]
MODULES = (
    test_blocks,
    test_cache,
    test_hash,
    test_id_map,
    test_program,
    test_ragged,
    test_sketch,
    test_transform,
    test_update,
)
STATE = ("header", "counters", "free_rows")
"""Arguments that keep the state of a map."""
REFUSAL = re.compile(
    r"(\w+)( or \w+)* must be on the device of the operator's first tensor|the operator's first tensor"
)


def checks() -> Iterator[Callable[..., None]]:
    """Yield the tests that call opcheck."""
    for module in MODULES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("test_") and "opcheck" in inspect.getsource(function):
                yield function


@pytest.fixture(scope="module")
def calls() -> Iterator[list[Call]]:
    """Valid calls of all operators: those that other tests check with opcheck."""
    owners: list[Any] = []  # frames whose tables own the memory at addresses in the arguments
    found: list[Call] = []

    def record(operator: Any, arguments: tuple[Any, ...], **_: Any) -> None:
        found.append((operator, arguments))
        owners.append(inspect.currentframe().f_back)  # type: ignore[union-attr]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.library, "opcheck", record)
        for check in checks():
            known = {"device": "emulated", "exact": False, "kind": 0}
            parameters = inspect.signature(check).parameters
            if parameters.keys() <= known.keys():
                check(**{name: known[name] for name in parameters})
    yield [(operator, tree_map(to_device, arguments)) for operator, arguments in found]
    owners.clear()


def to_device(leaf: Any) -> Any:
    return leaf.to("emulated") if isinstance(leaf, Tensor) else leaf


def variants(arguments: tuple[Any, ...], target: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield the arguments with one tensor moved to another device, and the number of the argument."""
    leaves, spec = tree_flatten(arguments)
    # The number of the argument that each leaf belongs to.
    owners = [number for number, argument in enumerate(arguments) for _ in tree_flatten(argument)[0]]
    for at, leaf in enumerate(leaves):
        # An empty tensor in a list stands for none.
        if isinstance(leaf, Tensor) and leaf.numel():
            yield owners[at], tree_unflatten([*leaves[:at], leaf.to(target), *leaves[at + 1 :]], spec)


@pytest.mark.emulated
def test_every_operator_is_called(calls: list[Call]) -> None:
    assert {operator.name().removesuffix(".default") for operator, _ in calls} >= set(OPERATORS) - set(HOST_ONLY)


@pytest.mark.emulated
@pytest.mark.parametrize("target", ["cpu", "emulated:1"])
@pytest.mark.parametrize("name", sorted(set(OPERATORS) - set(HOST_ONLY)))
def test_a_tensor_on_another_device_is_refused_by_name(calls: list[Call], name: str, target: str) -> None:
    for operator, arguments in calls:
        if operator.name().removesuffix(".default") != name:
            continue
        schema = [argument.name for argument in operator._schema.arguments]
        tensors = sum(isinstance(leaf, Tensor) for leaf in tree_flatten(arguments)[0])
        others = set()  # arguments that are not named: the one that determines the device
        for number, changed in variants(arguments, target):
            if tensors == 1:
                continue  # a call with one tensor is always on one device
            state = [part for part, name in zip(changed, schema, strict=False) if name in STATE]
            before = [part.clone() for part in state]
            with pytest.raises(RuntimeError) as error:
                operator(*changed)
            assert all(map(torch.equal, state, before)), f"{schema[number]} is refused after a change"
            found = REFUSAL.search(str(error.value))
            assert found is not None, (schema[number], str(error.value))
            # Some planes are weights.
            names = {schema[number], "weights" if schema[number] == "planes" else schema[number]}
            if found[1] not in names:
                others.add(schema[number])
        assert len(others) <= 1, others
