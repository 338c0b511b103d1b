"""Names of a module's parameters and buffers, the same whether or not ranks share it by DistributedDataParallel."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def own_names(module: nn.Module) -> dict[str, str]:
    """Find what the module itself calls its state.

    Args:
        module: which may be, or hold, wrapped modules.

    Returns:
        Names in its `state_dict`, by names without the wrappers: `tower.weight` is its `tower.module.weight`.
    """
    found = {}
    # The inner ones first, whose paths the outer ones are part of.
    wrapped = [name for name, each in module.named_modules() if isinstance(each, DistributedDataParallel)]
    prefixes = sorted((f"{name}." if name else "" for name in wrapped), key=len, reverse=True)
    for own in module.state_dict():
        name = own
        for prefix in prefixes:
            if name.startswith(f"{prefix}module."):
                name = prefix + name[len(prefix) + len("module.") :]
        found[name] = own
    return found
