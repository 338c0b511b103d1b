"""A tower written down for serving: its function as `jax.export` keeps it, and its parameters beside it."""

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

from recis_hybrid.bridge.dlpack import DTYPES, WIDE, x64_is_on
from recis_hybrid.bridge.tower._padding import Dims

PROGRAM: Final = "program.jax_export"
PARAMETERS: Final = "params.safetensors"


def describe(inputs: tuple[Any, ...], dims: Dims | None, where: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as shapes and dtypes whose named dimensions are symbols.

    Args:
        inputs: pytrees of tensors.
        dims: for each input, the names of its leading dimensions; without it, the first is "batch".
        where: what errors begin with.

    Returns:
        The inputs' structs, and the symbols by name.

    Raises:
        TypeError: if a leaf is not a tensor.
        ValueError: if a leaf's dtype cannot be held, or `dims` does not fit.
    """
    if dims is not None and len(dims) != len(inputs):
        raise ValueError(f"{where}: dims names {len(dims)} inputs, got {len(inputs)}")
    each = [("batch",)] * len(inputs) if dims is None else [names or () for names in dims]
    named = dict.fromkeys(name for names in each for name in names if name is not None)
    symbols = dict(zip(named, jax.export.symbolic_shape(",".join(named)), strict=True)) if named else {}

    def struct(path: Any, leaf: Any, names: Sequence[str | None], number: int) -> Any:
        label = f"{where}: input[{number}]{jax.tree_util.keystr(path)}"
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"{label}: takes tensors, got {type(leaf).__qualname__}")
        dtype = str(leaf.dtype).removeprefix("torch.")
        if leaf.dtype not in DTYPES or (leaf.dtype in WIDE and not x64_is_on()):
            raise ValueError(f"{label}: JAX has no {dtype} here (64-bit dtypes need jax_enable_x64); cast the tensor")
        if dims is not None and leaf.dim() < len(names):
            raise ValueError(f"{label}: dims names its dimensions {tuple(names)}, got shape {tuple(leaf.shape)}")
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
    """The masks of inputs that are not padded: all True."""
    return {name: jnp.ones((size,), bool) for name, size in symbols.items()}


def write(
    path: Path,
    function: Callable[..., Any],
    named: Mapping[str, torch.Tensor],
    structs: tuple[Any, ...],
    platforms: Sequence[str] | None,
    where: str,
) -> None:
    """Write `function(named, *inputs)` and the tensors into a new folder, which appears when it is complete."""
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
        # Copies, because parameters may share memory (tied weights), which safetensors refuses.
        values = {name: tensor.detach().cpu().clone() for name, tensor in named.items()}
        safetensors.torch.save_file(values, complete / PARAMETERS)
        os.rename(complete, path)
