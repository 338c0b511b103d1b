"""The arrays over a tower's parameters, kept from call to call, because an import costs more than a small kernel.

JAX takes arrays to be constant, and an optimizer writes to parameters. That is sound here for three reasons, all of
which are needed: nobody but the tower's own programs ever sees such an array; a program reads its arguments when it
runs; and a call returns when its program has ended, so that none runs while torch writes. On a GPU an import also makes
JAX's stream wait for torch's, so there each call imports anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import torch

from recis_hybrid.bridge.dlpack import WIDE, share

Kind = tuple[torch.Size, torch.dtype]

_Entry = tuple[torch.Tensor, int, torch.Size, torch.dtype, jax.Array, Kind]
_NONE: Any = (None,) * 6


class Imports:
    """For each parameter, by its number, the array over its memory.

    An entry is used only while it is the same `nn.Parameter` in the same memory, with the same shape and dtype:
    `parameter.data = …`, `resize_` and `share_memory_` exchange these under one object. Temporary tensors
    (`functional_call`, parametrizations) and 64-bit ones, whose import depends on x64, are imported anew.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Imports:
        return Imports()

    def __reduce__(self) -> tuple[type[Imports], tuple[()]]:
        return Imports, ()

    def clear(self) -> None:
        """Lets go of all memory."""
        self._entries.clear()

    def share(self, tensors: Sequence[torch.Tensor]) -> tuple[list[jax.Array], list[Kind]]:
        """The parameters' arrays, all of them, in their order, and what they are; raises what `share` does."""
        return self._share(enumerate(tensors))

    def share_one(self, number: int, tensor: torch.Tensor) -> tuple[jax.Array, Kind]:
        """The array of the parameter of that number, and what it is."""
        (array,), (kind,) = self._share([(number, tensor)])
        return array, kind

    def _share(self, numbered: Iterable[tuple[int, torch.Tensor]]) -> tuple[list[jax.Array], list[Kind]]:
        # One loop without calls of our own: a tower may have hundreds of parameters.
        entries = self._entries
        arrays, kinds = [], []
        for number, tensor in numbered:
            parameter, pointer, shape, dtype, array, kind = entries.get(number, _NONE)
            if (
                parameter is not tensor
                or tensor.data_ptr() != pointer
                or tensor.shape != shape
                or tensor.dtype is not dtype
                or not tensor.is_contiguous()
                or tensor.is_neg()
            ):
                array, kind = self._import(number, tensor)
            arrays.append(array)
            kinds.append(kind)
        return arrays, kinds

    def _import(self, number: int, tensor: torch.Tensor) -> tuple[jax.Array, Kind]:
        self._entries.pop(number, None)
        array, kind = share(tensor), (tensor.shape, tensor.dtype)
        kept = type(tensor) is torch.nn.Parameter and tensor.is_cpu and tensor.dtype not in WIDE
        if kept and not tensor.is_complex():
            self._entries[number] = (tensor, tensor.data_ptr(), *kind, array, kind)
        return array, kind
