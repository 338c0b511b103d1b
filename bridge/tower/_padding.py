"""Sizes that vary, padded to a few classes of sizes, so that a run compiles a bounded number of times."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import torch

Dims = Sequence[Sequence[str | None] | None]
"""For each positional input, the names of its leading dimensions; None for one that is never padded."""

SMALLEST = 8
"""The smallest power of two that sizes are padded to."""


class Padding:
    """Pads inputs, and cuts outputs back.

    Args:
        dims: the names of the inputs' dimensions.
        classes: by name, the sizes to pad to; None for powers of two from 8 on.
        where: what errors begin with.

    Raises:
        ValueError: if a name has no classes or no dimension, or classes are not positive integers.
    """

    def __init__(self, dims: Dims, classes: Mapping[str, Sequence[int] | None], where: str) -> None:
        named = {name for names in dims for name in names or () if name is not None}
        if named != set(classes):
            raise ValueError(
                f"{where}: dims names {sorted(named)} and classes has {sorted(classes)}; give each name its sizes, "
                "or None for powers of two"
            )
        for name, sizes in classes.items():
            if sizes is not None and (not sizes or any(type(size) is not int or size < 1 for size in sizes)):
                raise ValueError(f"{where}: classes[{name!r}] must be positive integers, got {sizes!r}")
        self.dims = tuple(None if names is None else tuple(names) for names in dims)
        self.classes = {name: None if sizes is None else sorted(sizes) for name, sizes in classes.items()}
        self.where = where

    def pad(self, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, int], dict[str, int]]:
        """Pad the inputs with zeros.

        Returns:
            The padded inputs, and by name the size that was found and the size that it has become.

        Raises:
            ValueError: if there are other inputs than `dims` names, two sizes of one name differ, or one is beyond the
                largest class.
        """
        if len(inputs) != len(self.dims):
            raise ValueError(f"{self.where}: dims names {len(self.dims)} inputs, got {len(inputs)}")
        found: dict[str, int] = {}
        for number, (names, value) in enumerate(zip(self.dims, inputs, strict=True)):
            for leaf in jax.tree.leaves(value) if names else ():
                self._measure(leaf, names or (), f"{self.where}: input[{number}]", found)
        padded = {name: self._class_of(name, size) for name, size in found.items()}
        grown = tuple(
            jax.tree.map(lambda leaf, names=names: _grow(leaf, names, padded), value) if names else value
            for names, value in zip(self.dims, inputs, strict=True)
        )
        return grown, found, padded

    def masks(
        self, found: dict[str, int], padded: dict[str, int], device: torch.device | None
    ) -> dict[str, torch.Tensor]:
        """By name, (padded size,) bool: True where the input has something."""
        return {name: torch.arange(padded[name], device=device) < size for name, size in found.items()}

    def structs(self, inputs: tuple[Any, ...], supplied: dict[str, Any], sizes: dict[str, int]) -> tuple[Any, ...]:
        """The inputs and what is supplied, arrays, as shapes and dtypes that they would have at other sizes."""

        def struct(leaf: jax.Array, names: tuple[str | None, ...]) -> Any:
            shape = [size if name is None else sizes[name] for size, name in zip(leaf.shape, names, strict=False)]
            return cast(Any, jax.ShapeDtypeStruct)((*shape, *leaf.shape[len(names) :]), leaf.dtype)

        grown = tuple(
            jax.tree.map(lambda leaf, names=names or (): struct(leaf, names), value)
            for names, value in zip(self.dims, inputs, strict=True)
        )
        masks = {name: struct(mask, (name,)) for name, mask in supplied.get("masks", {}).items()}
        return grown, supplied | {"masks": masks} if masks else supplied

    def cut(
        self, outputs: Sequence[torch.Tensor], axes: tuple[tuple[str | None, ...], ...], found: dict[str, int]
    ) -> list[torch.Tensor]:
        """Cuts each padded axis of each output back to the size that was found."""
        result = []
        for output, names in zip(outputs, axes, strict=True):
            for axis, name in enumerate(names):
                if name is not None and output.shape[axis] != found[name]:
                    output = output.narrow(axis, 0, found[name])
            result.append(output)
        return result

    def name_axes(
        self, outputs: Callable[[dict[str, int]], dict[str, Any]], padded: dict[str, int]
    ) -> tuple[tuple[str | None, ...], ...]:
        """Find which axes of the outputs are padded.

        Args:
            outputs: sizes by name → pytrees of the shapes and dtypes of outputs, by what errors call them.
            padded: the sizes of a call.

        Returns:
            For each axis of each output, the name whose size it has, and grows with; None if it grows with none.

        Raises:
            ValueError: if an axis grows with a size and does not have it: of such a one nobody knows what to cut off.
            Exception: what `outputs` raises, with a note.
        """

        def shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
            try:
                trees = outputs(sizes)
            except Exception as error:
                error.add_note(
                    f"raised by {self.where} with sizes {sizes}, by which it finds out which axes of its outputs are "
                    "padded; its function has to take all sizes"
                )
                raise
            return {
                f"{kind}{jax.tree_util.keystr(path)}": tuple(leaf.shape)
                for kind, tree in trees.items()
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }

        base = shapes(padded)
        grown = {name: shapes(padded | {name: size + 1}) for name, size in padded.items()}
        axes: list[tuple[str | None, ...]] = []
        for output, shape in base.items():
            names: list[str | None] = []
            for axis, size in enumerate(shape):
                after = {name: grown[name][output][axis] for name in padded if grown[name][output][axis] != size}
                names.append(next(iter(after), None))
                if len(after) > 1 or any(size != padded[name] or to != size + 1 for name, to in after.items()):
                    causes = " and ".join(
                        f"{to} where {name!r} is {padded[name] + 1} instead of {padded[name]}"
                        for name, to in after.items()
                    )
                    raise ValueError(
                        f"{self.where}: axis {axis} of {output} has size {size}, and {causes}; as it has not the size "
                        "of one padded dimension, the tower cannot cut it back: return the parts that do apart, and "
                        "join them outside of it, or pad outside of it"
                    )
            axes.append(tuple(names))
        return tuple(axes)

    def _measure(self, leaf: Any, names: tuple[str | None, ...], where: str, found: dict[str, int]) -> None:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < len(names):
            got = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__qualname__
            raise ValueError(f"{where}: dims names its dimensions {names}, got {got}")
        for axis, name in enumerate(names):
            if name is not None and found.setdefault(name, leaf.shape[axis]) != leaf.shape[axis]:
                raise ValueError(f"{where}: {name!r} is {leaf.shape[axis]} here and {found[name]} in what came before")

    def _class_of(self, name: str, size: int) -> int:
        sizes = self.classes[name]
        if sizes is None:
            return max(SMALLEST, 1 << max(size - 1, 0).bit_length())
        place = bisect.bisect_left(sizes, size)
        if place == len(sizes):
            raise ValueError(
                f"{self.where}: {name!r} is {size}, beyond its largest class {sizes[-1]}; add a class, or split the "
                "batch"
            )
        return sizes[place]


def _grow(leaf: torch.Tensor, names: tuple[str | None, ...], padded: dict[str, int]) -> torch.Tensor:
    target = [size if name is None else padded[name] for size, name in zip(leaf.shape, names, strict=False)]
    target += leaf.shape[len(names) :]
    if tuple(target) == tuple(leaf.shape):
        return leaf
    amounts = [pair for size, want in zip(leaf.shape, target, strict=True) for pair in (want - size, 0)]
    return torch.nn.functional.pad(leaf, amounts[::-1])
