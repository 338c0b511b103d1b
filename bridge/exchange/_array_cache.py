"""A cache of the array views of a tower's parameters, because a conversion costs more than a small kernel.

JAX assumes that arrays are immutable, but an optimizer writes to parameters. Caching an array is safe here for three
reasons, all of which are required: only the tower's own programs use it; a program reads its arguments when it runs;
and a call returns after its program has finished, so no program runs while torch writes. On a GPU a conversion also
makes JAX's stream wait for torch's, so arrays are not cached there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import torch

from recis_hybrid.bridge.exchange.dlpack import WIDE, share

Spec = tuple[torch.Size, torch.dtype]
"""Shape and dtype of a tensor."""

_Entry = tuple[torch.Tensor, int, torch.Size, torch.dtype, jax.Array, Spec]
_MISSING: Any = (None,) * 6


class ArrayCache:
    """Array views of parameters, by the parameter's index.

    An entry is valid only for the same ``nn.Parameter`` with the same memory, shape and dtype, because
    ``parameter.data = …``, ``resize_`` and ``share_memory_`` replace these without replacing the object. Temporary
    tensors (``functional_call``, parametrizations) and 64-bit tensors, whose conversion depends on x64, are not cached.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ArrayCache:
        """Return an empty cache, because a copy of a tower has its own parameters."""
        return ArrayCache()

    def __reduce__(self) -> tuple[type[ArrayCache], tuple[()]]:
        """Pickle as an empty cache."""
        return ArrayCache, ()

    def clear(self) -> None:
        """Drop all entries and their references to memory."""
        self._entries.clear()

    def share(self, tensors: Sequence[torch.Tensor]) -> tuple[list[jax.Array], list[Spec]]:
        """Return the array views and specs of all parameters, in order.

        Args:
            tensors: The parameters.

        Raises:
            TypeError: if one is not a plain tensor.
            ValueError: if the memory of one cannot be shared.
        """
        return self._share(enumerate(tensors))

    def share_one(self, number: int, tensor: torch.Tensor) -> tuple[jax.Array, Spec]:
        """Return the array view and spec of one parameter.

        Args:
            number: The parameter's index in the argument of :meth:`share`.
            tensor: The parameter.

        Raises:
            TypeError: if it is not a plain tensor.
            ValueError: if its memory cannot be shared.
        """
        (array,), (spec,) = self._share([(number, tensor)])
        return array, spec

    def _share(self, numbered: Iterable[tuple[int, torch.Tensor]]) -> tuple[list[jax.Array], list[Spec]]:
        """Return the array views and specs of numbered parameters."""
        # A tower may have hundreds of parameters, so a hit calls no Python function.
        entries = self._entries
        arrays, specs = [], []
        for number, tensor in numbered:
            parameter, pointer, shape, dtype, array, spec = entries.get(number, _MISSING)
            if (
                parameter is not tensor
                or tensor.data_ptr() != pointer
                or tensor.shape != shape
                or tensor.dtype is not dtype
                or not tensor.is_contiguous()
                or tensor.is_neg()
            ):
                array, spec = self._convert(number, tensor)
            arrays.append(array)
            specs.append(spec)
        return arrays, specs

    def _convert(self, number: int, tensor: torch.Tensor) -> tuple[jax.Array, Spec]:
        """Return the array view of a tensor, and cache it if that is safe."""
        self._entries.pop(number, None)
        array, spec = share(tensor), (tensor.shape, tensor.dtype)
        is_stable = type(tensor) is torch.nn.Parameter and tensor.is_cpu and tensor.dtype not in WIDE
        if is_stable and not tensor.is_complex():
            self._entries[number] = (tensor, tensor.data_ptr(), *spec, array, spec)
        return array, spec
