"""A pytree of arrays turned into parameters that torch owns, under dotted names, and found again at each call.

`{"layers": [{"w": …}]}` gives the parameter `layers.0.w`: containers become plain modules, so that `state_dict`,
optimizers, `.to` and wrappers find what they expect. A key that has dots itself (`"encoder.layer.0.weight"`) names the
same nesting. Leaves of integers or booleans, which have no gradient, become buffers.
"""

from __future__ import annotations

from typing import Any, Final

import jax
import numpy as np
import torch

from recis_hybrid.bridge.dlpack import DTYPES, WIDE, to_torch, x64_is_on

ROOT_NAME: Final = "param"
"""What a parameter is called when it is the whole pytree."""

Slot = tuple[torch.nn.Module, str]
"""The module that owns a leaf, and the leaf's name in it."""


def plant(
    module: torch.nn.Module, params: Any, where: str, kind: str = "params"
) -> tuple[tuple[Slot, ...], jax.tree_util.PyTreeDef]:
    """Put a copy of each leaf into a module, as a parameter or buffer under the leaf's dotted name.

    Args:
        module: the module to own them.
        params: a pytree of arrays of JAX, numpy or torch.
        where: what errors begin with.
        kind: "params", or "state" for a pytree whose leaves all become buffers.

    Returns:
        The slots, in the order of the pytree's leaves, and the pytree's structure.

    Raises:
        TypeError: if a leaf is not an array.
        ValueError: if a leaf's dtype cannot be held, or two leaves have one name, or a name is empty.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    slots = []
    for path, leaf in leaves:
        tensor = _own(leaf, f"{where}: {kind}{jax.tree_util.keystr(path)}")
        slots.append(_place(module, _names(path), tensor, where, kind))
    return tuple(slots), tree


def gather(slots: tuple[Slot, ...]) -> list[torch.Tensor]:
    """The tensors that are in the slots now: `.to`, `functional_call` and parametrizations exchange them."""
    tensors: list[torch.Tensor] = []
    for owner, name in slots:
        tensor: torch.Tensor | None = owner._parameters.get(name)
        if tensor is None:
            tensor = owner._buffers.get(name)
        tensors.append(getattr(owner, name) if tensor is None else tensor)
    return tensors


def dotted(slots: tuple[Slot, ...], root: torch.nn.Module) -> list[str]:
    """The slots' dotted names, for errors."""
    prefixes = {id(module): f"{name}." if name else "" for name, module in root.named_modules()}
    return [prefixes.get(id(owner), "") + name for owner, name in slots]


def _names(path: tuple[Any, ...]) -> list[str]:
    names: list[str] = []
    for entry in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                names.extend(str(getattr(entry, attribute)).split("."))
                break
        else:
            names.append(str(entry))
    return names or [ROOT_NAME]


def _place(module: torch.nn.Module, names: list[str], tensor: torch.Tensor, where: str, kind: str) -> Slot:
    full = ".".join(names)
    if "" in names:
        raise ValueError(f"{where}: a parameter's name needs a word between dots, got {full!r}; rename the key")
    for name in names[:-1]:
        if name in module._parameters or name in module._buffers:
            raise ValueError(f"{where}: {full!r} lies under {name!r}, which is a parameter itself; rename a key")
        # Not add_module and register_parameter: they refuse names like `type` that nn.Module has as methods.
        child = module._modules.get(name)
        if child is None:
            child = module._modules[name] = torch.nn.Module()
        module = child
    name = names[-1]
    if name in module._parameters or name in module._buffers or name in module._modules:
        raise ValueError(f"{where}: two entries of {kind} are called {full!r}; rename a key")
    if kind == "params" and (tensor.is_floating_point() or tensor.is_complex()):
        module._parameters[name] = torch.nn.Parameter(tensor)
    else:
        module._buffers[name] = tensor
    return module, name


def _own(leaf: object, where: str) -> torch.Tensor:
    """A contiguous copy of an array in memory of torch, which torch's allocators align to 64 bytes."""
    if isinstance(leaf, torch.Tensor):
        tensor = leaf.detach()
    elif isinstance(leaf, jax.Array):
        try:
            tensor = to_torch(leaf)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
    elif isinstance(leaf, np.ndarray | np.generic):
        tensor = _from_numpy(np.asarray(leaf), where)
    else:
        raise TypeError(
            f"{where}: takes arrays of JAX, numpy or torch, got {type(leaf).__qualname__}; wrap a number by "
            "numpy.asarray(x, 'float32'), and close over what is no array (functools.partial)"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{where}: is {tensor.dtype}, which JAX has not; cast it")
    if tensor.dtype in WIDE and not x64_is_on():
        raise ValueError(
            f"{where}: is {str(tensor.dtype).removeprefix('torch.')}, which JAX holds only with x64 on; turn it on by "
            "jax.config.update('jax_enable_x64', True), or cast the array to 32 bits"
        )
    return tensor.clone(memory_format=torch.contiguous_format)


def _from_numpy(array: np.ndarray[Any, Any], where: str) -> torch.Tensor:
    own = getattr(torch, array.dtype.name, None)
    if not isinstance(own, torch.dtype):
        raise TypeError(f"{where}: torch has no dtype {array.dtype.name!r}; cast the array")
    # numpy's bfloat16 and float8 come from a package that torch does not know: hand over their bytes, in our order.
    plain = np.array(array, dtype=array.dtype.newbyteorder("="), order="C").reshape(-1).view(np.uint8)
    return torch.from_numpy(plain).view(own).reshape(array.shape)
