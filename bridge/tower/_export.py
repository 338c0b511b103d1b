"""Export of a tower for serving: its function, serialized by ``jax.export``, and its parameters."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import safetensors.torch
import torch

from recis_hybrid.bridge.exchange.dlpack import DTYPES, WIDE, x64_is_on
from recis_hybrid.bridge.tower._padding import Dims

PROGRAM: Final = "program.jax_export"
PARAMETERS: Final = "params.safetensors"


def describe(inputs: tuple[Any, ...], dims: Dims | None, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the shapes and dtypes of inputs, with symbols for their named dimensions.

    Args:
        inputs: Pytrees of tensors.
        dims: For each input, the names of its leading dimensions; by default the first dimension is "batch".
        where: The prefix of error messages.

    Returns:
        The inputs as pytrees of ``jax.ShapeDtypeStruct``, and the symbols by name.

    Raises:
        TypeError: if a leaf is not a tensor.
        ValueError: if JAX lacks a leaf's dtype, or ``dims`` does not fit the inputs.
    """
    if dims is not None and len(dims) != len(inputs):
        raise ValueError(f"{where}: dims is for {len(dims)} inputs, got {len(inputs)}")
    each = [("batch",)] * len(inputs) if dims is None else [names or () for names in dims]
    named = dict.fromkeys(name for names in each for name in names if name is not None)
    symbols = dict(zip(named, jax.export.symbolic_shape(",".join(named)), strict=True)) if named else {}

    def struct(path: Any, leaf: Any, names: Sequence[str | None], number: int) -> Any:
        label = f"{where}: input[{number}]{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"{label}: expected tensors, got {type(leaf).__qualname__}")
        dtype = str(leaf.dtype).removeprefix("torch.")
        if leaf.dtype not in DTYPES or (leaf.dtype in WIDE and not x64_is_on()):
            raise ValueError(
                f"{label}: JAX does not support {dtype} (64-bit dtypes need jax_enable_x64); cast the tensor"
            )
        if dims is not None and leaf.dim() < len(names):
            raise ValueError(f"{label}: must have dimensions {tuple(names)}, got shape {tuple(leaf.shape)}; fix dims")
        shape = [size if name is None else symbols[name] for name, size in zip(names, leaf.shape, strict=False)]
        return cast(Any, jax.ShapeDtypeStruct)((*shape, *leaf.shape[len(shape) :]), dtype)

    structs = tuple(
        jax.tree_util.tree_map_with_path(
            lambda path, leaf, names=names, number=number: struct(path, leaf, names, number), value
        )
        for number, (names, value) in enumerate(zip(each, inputs, strict=True))
    )
    return structs, symbols


def masks(symbols: Mapping[str, Any]) -> dict[str, Any]:
    """Return the masks of inputs without padding: bool ``(size,)`` for each name, all True."""
    return {name: jnp.ones((size,), bool) for name, size in symbols.items()}


def write(
    path: Path,
    function: Callable[..., Any],
    named: Mapping[str, torch.Tensor],
    structs: tuple[Any, ...],
    platforms: Sequence[str] | None,
    where: str,
) -> None:
    """Write a function and its parameters to a new folder, atomically.

    Args:
        path: The folder to create.
        function: ``function(named, *inputs)``, which jit can trace.
        named: The parameters and the state, by dotted name.
        structs: The shapes and dtypes of the inputs.
        platforms: The platforms to compile for; None for JAX's default backend.
        where: The prefix of error messages.

    Raises:
        FileExistsError: if the folder exists.
    """
    if path.exists():
        raise FileExistsError(f"{where}: {path} exists; export to a new folder")
    params = {
        name: cast(Any, jax.ShapeDtypeStruct)(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in named.items()
    }
    exported = jax.export.export(jax.jit(function), platforms=platforms)(params, *structs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        complete = Path(folder) / "complete"
        complete.mkdir()
        (complete / PROGRAM).write_bytes(exported.serialize())
        # Cloned, because safetensors refuses parameters that share memory (tied weights).
        values = {name: tensor.detach().cpu().clone() for name, tensor in named.items()}
        safetensors.torch.save_file(values, complete / PARAMETERS)
        os.rename(complete, path)
