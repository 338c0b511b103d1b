"""Names of a module's parameters and buffers, the same whether or not the module is wrapped."""

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from recis_hybrid.state import tables_apart


def own_names(module: nn.Module) -> dict[str, str]:
    """Find what the module itself calls its state.

    Args:
        module: which may be, or hold, modules wrapped by DistributedDataParallel, DataParallel or torch.compile, in
            any order.

    Returns:
        Names in its `state_dict`, by names without the wrappers: `tower.weight` is its `tower.module.weight`, or its
        `tower._orig_mod.weight`.
    """
    found = {}
    # The inner ones first, whose paths the outer ones are part of.
    wrapped = [
        (f"{name}." if name else "", inner)
        for name, each in module.named_modules(remove_duplicate=False)
        if (inner := _inner(each))
    ]
    wrapped.sort(key=lambda pair: len(pair[0]), reverse=True)
    with tables_apart():
        state = module.state_dict()
    for own in state:
        name = own
        for prefix, inner in wrapped:
            if name.startswith(f"{prefix}{inner}."):
                name = prefix + name[len(prefix) + len(inner) + 1 :]
        found[name] = own
    return found


def _inner(module: nn.Module) -> str | None:
    """Return under which name a wrapper holds its module; None where the module is no wrapper."""
    if isinstance(module, DistributedDataParallel | DataParallel):
        return "module"
    # Its class is there as soon as anything was compiled; it is not loaded for this.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if compiler is not None and isinstance(module, compiler.OptimizedModule) else None
