"""Checks of the tensors of a RaggedTensor."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch

Parts: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]
"""The values, offsets, weights and outer offsets of a RaggedTensor."""


def describe(tensor: torch.Tensor) -> str:
    """Return a tensor's dtype and shape for a message, such as ``int64[3]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def check_form(
    values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, outer: tuple[torch.Tensor, ...]
) -> None:
    """Check types, dtypes, shapes and devices, without reading content.

    Raises:
        TypeError: If an argument is not a tensor or has another dtype.
        ValueError: If shapes or devices do not fit together.
    """
    levels = [(f"outer[{number}]", level) for number, level in enumerate(outer)]
    for name, tensor in (("values", values), ("offsets", offsets), ("weights", weights), *levels):
        if not (isinstance(tensor, torch.Tensor) or (name == "weights" and tensor is None)):
            raise TypeError(f"RaggedTensor: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if values.dim() == 0:
        raise ValueError("RaggedTensor: values must be [N] or [N, ...], got a tensor without dimensions")
    for name, level in (("offsets", offsets), *levels):
        if level.dtype != torch.int64:
            raise TypeError(f"RaggedTensor: {name} must be int64, got {level.dtype}; convert with .to(torch.int64)")
        if level.dim() != 1 or level.shape[0] == 0:
            raise ValueError(
                f"RaggedTensor: {name} must be [B + 1] with at least one entry, got {describe(level)}; "
                f"a batch without rows has the offsets [0]"
            )
        if level.device != values.device:
            raise ValueError(
                f"RaggedTensor: {name} and values must be on one device, got {level.device} and {values.device}"
            )
    if weights is not None:
        _check_weights(values, offsets, weights, bool(outer))


def _check_weights(values: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, nested: bool) -> None:
    if weights.dtype != torch.float32:
        raise TypeError(f"RaggedTensor: weights must be float32, got {weights.dtype}; convert with .float()")
    of_strings = nested and values.dtype == torch.uint8
    count = offsets.shape[0] - 1 if of_strings else values.shape[0]
    if weights.dim() != 1 or weights.shape[0] != count:
        rule = "[M], one for each string, M" if of_strings else "[N], one for each value, N"
        raise ValueError(f"RaggedTensor: weights must be {rule} = {count}, got {describe(weights)}")
    if weights.device != values.device:
        raise ValueError(
            f"RaggedTensor: weights and values must be on one device, got {weights.device} and {values.device}"
        )


def check_content(count: int, offsets: torch.Tensor, outer: tuple[torch.Tensor, ...], *, tail: bool = False) -> None:
    """Check the content of offsets on the CPU.

    Args:
        count: Number of values, N.
        offsets: int64 ``[M + 1]``.
        outer: int64 offsets of the levels above.
        tail: Whether unused values (or lists) may follow the last offset; operations on a GPU may leave some.

    Raises:
        ValueError: If offsets do not start with 0, decrease, or do not end with the number of values or lists.
    """
    for number, level in enumerate(outer):
        following = outer[number + 1] if number + 1 < len(outer) else offsets
        _check_offsets(f"outer[{number}]", level, following.shape[0] - 1, "lists of the next level", tail)
    _check_offsets("offsets", offsets, count, "values", tail)


def _check_offsets(name: str, offsets: torch.Tensor, count: int, items: str, tail: bool) -> None:
    # A numpy view takes a tenth of the time of three torch calls, and readers create many RaggedTensors.
    array = offsets.numpy()
    if array[0] != 0:
        raise ValueError(
            f"RaggedTensor: {name} must start with 0, got {int(array[0])}; "
            f"subtract the first entry of a slice of offsets"
        )
    if (array[1:] < array[:-1]).any():
        row = int(np.flatnonzero(array[1:] < array[:-1])[0])
        raise ValueError(
            f"RaggedTensor: {name} must not decrease, got {int(array[row])} and then {int(array[row + 1])} at row {row}"
        )
    if array[-1] > count or (array[-1] < count and not tail):
        raise ValueError(f"RaggedTensor: {name} must end with the number of {items}, {count}, got {int(array[-1])}")


def one_level(where: str, outer: tuple[torch.Tensor, ...]) -> None:
    """Raise ValueError if rows hold lists."""
    if outer:
        raise ValueError(f"{where}: rows must hold values, got lists ({1 + len(outer)} levels)")
