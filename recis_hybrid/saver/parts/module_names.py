"""Names of a module's parameters and buffers, the same whether or not the module is wrapped."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from recis_hybrid.checkpointing import tables_apart


def own_names(module: nn.Module) -> dict[str, str]:
    """Find what the module itself calls its state.

    Args:
        module: Which may be, or hold, modules wrapped by DistributedDataParallel, DataParallel or torch.compile, in
            any order.

    Returns:
        Names in its ``state_dict``, by names without the wrappers: ``tower.weight`` is its ``tower.module.weight``, or
        its ``tower._orig_mod.weight``.
    """
    with tables_apart():
        state = list(module.state_dict())
    return dict(zip(without_wrappers(module, state), state, strict=True))


def without_wrappers(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Return names of state or submodules without the names of wrappers.

    Args:
        module: As for ``own_names``.
        names: The module's own.
    """
    wrapped = [
        (f"{path}." if path else "", f"{inner}.")
        for path, each in module.named_modules(remove_duplicate=False)
        if (inner := _inner(each))
    ]
    # The inner ones first, whose paths the outer ones are part of.
    wrapped.sort(key=lambda pair: len(pair[0]), reverse=True)
    found = []
    for name in names:
        name += "."
        for prefix, inner in wrapped:
            if name.startswith(prefix + inner):
                name = prefix + name[len(prefix) + len(inner) :]
        found.append(name[:-1])
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers; a module without wrappers itself."""
    while inner := _inner(module):
        module = module.get_submodule(inner)
    return module


def _inner(module: nn.Module) -> str | None:
    """Return the attribute by which a wrapper holds its module; None if the module is not a wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return "module"
    # Its class is there as soon as anything was compiled; it is not loaded for this.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if compiler is not None and isinstance(module, compiler.OptimizedModule) else None
