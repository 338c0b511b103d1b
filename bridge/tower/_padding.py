"""Padding of varying sizes to a few size classes, which bounds the number of compilations."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import torch

Dims = Sequence[Sequence[str | None] | None]
"""For each positional input, the names of its leading dimensions; None for dimensions that are not padded."""

SMALLEST = 8
"""The smallest power of two to which sizes are padded."""


class Padding:
    """Padding of inputs and trimming of outputs.

    Args:
        dims: The names of the inputs' dimensions.
        classes: The sizes to pad to, by name; None for powers of two of at least 8.
        where: The prefix of error messages.

    Raises:
        ValueError: if a name has no classes or no dimension, or classes are not positive integers.
    """

    def __init__(self, dims: Dims, classes: Mapping[str, Sequence[int] | None], where: str) -> None:
        named = {name for names in dims for name in names or () if name is not None}
        if named != set(classes):
            raise ValueError(
                f"{where}: dims and classes must have the same names, got {sorted(named)} and {sorted(classes)}; set "
                "sizes for each name, or None for powers of two"
            )
        for name, sizes in classes.items():
            if sizes is not None and (not sizes or any(type(size) is not int or size < 1 for size in sizes)):
                raise ValueError(f"{where}: classes[{name!r}] must be positive integers, got {sizes!r}")
        self.dims = tuple(None if names is None else tuple(names) for names in dims)
        self.classes = {name: None if sizes is None else sorted(sizes) for name, sizes in classes.items()}
        self.where = where

    def pad(self, inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, int], dict[str, int]]:
        """Pad the inputs with zeros.

        Args:
            inputs: Pytrees of tensors, one for each entry of ``dims``.

        Returns:
            The padded inputs, and the sizes by name before and after padding.

        Raises:
            ValueError: if ``dims`` does not fit the inputs, sizes of one name differ, or a size exceeds the largest
                class.
        """
        if len(inputs) != len(self.dims):
            raise ValueError(f"{self.where}: dims is for {len(self.dims)} inputs, got {len(inputs)}")
        sizes: dict[str, int] = {}
        for number, (names, value) in enumerate(zip(self.dims, inputs, strict=True)):
            for leaf in jax.tree.leaves(value) if names else ():
                self._measure(leaf, names or (), f"{self.where}: input[{number}]", sizes)
        padded = {name: self._class_of(name, size) for name, size in sizes.items()}
        results = tuple(
            jax.tree.map(lambda leaf, names=names: _pad(leaf, names, padded), value) if names else value
            for names, value in zip(self.dims, inputs, strict=True)
        )
        return results, sizes, padded

    def masks(
        self, sizes: dict[str, int], padded: dict[str, int], device: torch.device | None
    ) -> dict[str, torch.Tensor]:
        """Return the masks of padded inputs: bool ``(padded size,)`` for each name, True before the padding."""
        return {name: torch.arange(padded[name], device=device) < size for name, size in sizes.items()}

    def structs(self, inputs: tuple[Any, ...], keywords: dict[str, Any], sizes: dict[str, int]) -> tuple[Any, ...]:
        """Return the shapes and dtypes that inputs and keywords would have at other sizes.

        Args:
            inputs: Pytrees of arrays.
            keywords: The keywords of the tower's function, including the masks.
            sizes: The sizes by name.
        """

        def struct(leaf: jax.Array, names: tuple[str | None, ...]) -> Any:
            shape = [size if name is None else sizes[name] for size, name in zip(leaf.shape, names, strict=False)]
            return cast(Any, jax.ShapeDtypeStruct)((*shape, *leaf.shape[len(names) :]), leaf.dtype)

        resized = tuple(
            jax.tree.map(lambda leaf, names=names or (): struct(leaf, names), value)
            for names, value in zip(self.dims, inputs, strict=True)
        )
        masks = {name: struct(mask, (name,)) for name, mask in keywords.get("masks", {}).items()}
        return resized, keywords | {"masks": masks} if masks else keywords

    def trim(
        self, outputs: Sequence[torch.Tensor], axes: tuple[tuple[str | None, ...], ...], sizes: dict[str, int]
    ) -> list[torch.Tensor]:
        """Trim each padded axis of each output to its size before padding.

        Args:
            outputs: Tensors of any shapes.
            axes: The result of :meth:`name_axes`.
            sizes: The sizes before padding, by name.
        """
        result = []
        for output, names in zip(outputs, axes, strict=True):
            for axis, name in enumerate(names):
                if name is not None and output.shape[axis] != sizes[name]:
                    output = output.narrow(axis, 0, sizes[name])
            result.append(output)
        return result

    def name_axes(
        self, outputs: Callable[[dict[str, int]], dict[str, Any]], padded: dict[str, int]
    ) -> tuple[tuple[str | None, ...], ...]:
        """Return which axes of the outputs are padded.

        Args:
            outputs: A function from sizes by name to pytrees of the shapes and dtypes of outputs, keyed by their labels
                in error messages.
            padded: The padded sizes of a call, by name.

        Returns:
            For each axis of each output, the name whose size it has; None for an axis that depends on no size.

        Raises:
            ValueError: if an axis depends on a size in another way, so that it is unclear what to trim.
            Exception: any exception of ``outputs``, with a note.
        """

        def shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
            try:
                trees = outputs(sizes)
            except Exception as error:
                error.add_note(
                    f"raised by {self.where} for sizes {sizes}, which it tests to find the padded axes of its outputs; "
                    "its function must accept all sizes"
                )
                raise
            return {
                f"{kind}{jax.tree_util.keystr(path)}": tuple(leaf.shape)
                for kind, tree in trees.items()
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            }

        base = shapes(padded)
        other_sizes = {name: self._other_size(name, size) for name, size in padded.items()}
        others = {name: shapes(padded | {name: size}) for name, size in other_sizes.items()}
        axes: list[tuple[str | None, ...]] = []
        for output, shape in base.items():
            names: list[str | None] = []
            for axis, size in enumerate(shape):
                after = {name: others[name][output][axis] for name in padded if others[name][output][axis] != size}
                names.append(next(iter(after), None))
                if len(after) > 1 or any(size != padded[name] or to != other_sizes[name] for name, to in after.items()):
                    causes = " and ".join(
                        f"{to} if {name!r} is {other_sizes[name]} instead of {padded[name]}"
                        for name, to in after.items()
                    )
                    raise ValueError(
                        f"{self.where}: axis {axis} of {output} has size {size}, and {causes}, so it does not have the "
                        "size of one padded dimension, and the tower cannot trim it; return its parts separately and "
                        "join them outside the tower, or pad outside the tower"
                    )
            axes.append(tuple(names))
        return tuple(axes)

    @staticmethod
    def _measure(leaf: Any, names: tuple[str | None, ...], where: str, sizes: dict[str, int]) -> None:
        """Add the sizes of a leaf's named dimensions to ``sizes``."""
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < len(names):
            got = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__qualname__
            raise ValueError(f"{where}: must be a tensor with dimensions {names}, got {got}; fix dims")
        for axis, name in enumerate(names):
            if name is not None and sizes.setdefault(name, leaf.shape[axis]) != leaf.shape[axis]:
                raise ValueError(f"{where}: {name!r} is {leaf.shape[axis]} here, but {sizes[name]} before")

    def _other_size(self, name: str, padded: int) -> int:
        """Return a size next to a class. The function may refuse sizes that exceed the largest class."""
        sizes = self.classes[name]
        return padded - 1 if sizes is not None and padded == sizes[-1] and padded > 1 else padded + 1

    def _class_of(self, name: str, size: int) -> int:
        """Return the smallest class that fits a size."""
        sizes = self.classes[name]
        if sizes is None:
            return max(SMALLEST, 1 << max(size - 1, 0).bit_length())
        place = bisect.bisect_left(sizes, size)
        if place == len(sizes):
            raise ValueError(
                f"{self.where}: {name!r} is {size}, which exceeds its largest class {sizes[-1]}; add a class, or split "
                "the batch"
            )
        return sizes[place]


def _pad(leaf: torch.Tensor, names: tuple[str | None, ...], padded: dict[str, int]) -> torch.Tensor:
    """Pad the named axes of a tensor with zeros, without a copy if it already has the padded sizes."""
    target = [size if name is None else padded[name] for size, name in zip(leaf.shape, names, strict=False)]
    target += leaf.shape[len(names) :]
    if tuple(target) == tuple(leaf.shape):
        return leaf
    amounts = [pair for size, want in zip(leaf.shape, target, strict=True) for pair in (want - size, 0)]
    return torch.nn.functional.pad(leaf, amounts[::-1])
