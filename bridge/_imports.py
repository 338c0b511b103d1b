"""The arrays over a tower's parameters, kept from call to call, because an import costs more than a small kernel.

JAX takes arrays to be constant, and an optimizer writes to parameters. That is sound here for three reasons, all of
which are needed: nobody but the tower's own programs ever sees such an array; a program reads its arguments when it
runs; and a call returns when its program has ended, so that none runs while torch writes. On a GPU an import also makes
JAX's stream wait for torch's, so there each call imports anew.
"""

from collections.abc import Sequence
from typing import Any

import jax
import torch

from .dlpack import WIDE, share

_Entry = tuple[torch.Tensor, int, torch.Size, torch.dtype, jax.Array]


class Imports:
    """For each parameter, by its number, the array over its memory.

    An entry is used only while it is the same `nn.Parameter` in the same memory, with the same shape and dtype:
    `parameter.data = …`, `resize_` and `share_memory_` exchange these under one object. Temporary tensors
    (`functional_call`, parametrizations) and 64-bit ones, whose import depends on x64, are imported anew.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Imports":
        return Imports()

    def __reduce__(self) -> tuple[type["Imports"], tuple[()]]:
        return Imports, ()

    def clear(self) -> None:
        """Lets go of all memory."""
        self._entries.clear()

    def share(self, tensors: Sequence[torch.Tensor]) -> list[jax.Array]:
        """The parameters' arrays, all of them, in their order; raises what `share` does."""
        return [self.share_one(number, tensor) for number, tensor in enumerate(tensors)]

    def share_one(self, number: int, tensor: torch.Tensor) -> jax.Array:
        """The array of the parameter of that number."""
        entry = self._entries.get(number)
        if entry is not None:
            parameter, pointer, shape, dtype, array = entry
            if (
                parameter is tensor
                and tensor.data_ptr() == pointer
                and tensor.shape == shape
                and tensor.dtype is dtype
                and tensor.is_contiguous()
                and not tensor.is_neg()
            ):
                return array
            del self._entries[number]
        array = share(tensor)
        kept = type(tensor) is torch.nn.Parameter and tensor.is_cpu and tensor.dtype not in WIDE
        if kept and not tensor.is_complex():
            self._entries[number] = (tensor, tensor.data_ptr(), tensor.shape, tensor.dtype, array)
        return array
