"""Names of a module's parameters and buffers, whether or not the module is wrapped."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from recis_hybrid.checkpointing import tables_apart


def own_names(module: nn.Module) -> dict[str, str]:
    """Map names without wrappers to the names in a module's own ``state_dict``.

    Args:
        module: May be, or contain, modules wrapped by DistributedDataParallel, DataParallel or torch.compile, in any
            order.

    Returns:
        Keys of its ``state_dict`` by name without wrappers: ``tower.weight`` maps to ``tower.module.weight``, or to
        ``tower._orig_mod.weight``.
    """
    with tables_apart():
        state = list(module.state_dict())
    return dict(zip(without_wrappers(module, state), state, strict=True))


def without_wrappers(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Remove the names of wrappers from names of state or submodules.

    Args:
        module: As for :func:`own_names`.
        names: The module's own names.
    """
    wrapped = [
        (f"{path}." if path else "", f"{inner}.")
        for path, each in module.named_modules(remove_duplicate=False)
        if (inner := _inner(each))
    ]
    # Inner wrappers first, because their paths contain those of the outer ones.
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
    # The class exists once anything has been compiled; torch._dynamo is not imported just for this check.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if compiler is not None and isinstance(module, compiler.OptimizedModule) else None
