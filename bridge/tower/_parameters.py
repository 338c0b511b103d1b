"""Registration of a pytree of arrays as torch parameters under dotted names, and access to them in each call.

``{"layers": [{"w": …}]}`` becomes the parameter ``layers.0.w``: containers become plain modules, so that
``state_dict``, optimizers, ``.to`` and wrappers work as usual. A key with dots (``"encoder.layer.0.weight"``) stands
for the same nesting. Integer and boolean leaves, which have no gradient, become buffers.
"""

from __future__ import annotations

from typing import Any, Final

import jax
import numpy as np
import torch

from recis_hybrid.bridge.exchange.dlpack import DTYPES, WIDE, to_torch, x64_is_on

ROOT_NAME: Final = "param"
"""The name of a parameter that is the whole pytree."""

Slot = tuple[torch.nn.Module, str]
"""The module that owns a leaf, and the name of the leaf in it."""


def register_leaves(
    module: torch.nn.Module, params: Any, where: str, kind: str = "params", *, copy: bool = True
) -> tuple[tuple[Slot, ...], jax.tree_util.PyTreeDef]:
    """Put each leaf into a module, as a parameter or buffer under the leaf's dotted name.

    Args:
        module: The module that will own them.
        params: A pytree of JAX, numpy or torch arrays.
        where: The prefix of error messages.
        kind: "params", or "state" for a pytree whose leaves all become buffers.
        copy: Whether to copy torch tensors. Other arrays, whose memory torch does not own, are always copied.

    Returns:
        The slots, in the order of the pytree's leaves, and the structure of the pytree.

    Raises:
        TypeError: if a leaf is not an array.
        ValueError: if JAX lacks a leaf's dtype, or names are empty or collide.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    slots = []
    for path, leaf in leaves:
        tensor = _own(leaf, f"{where}: {kind}{jax.tree_util.keystr(path)}", copy)
        slots.append(_register(module, path_names(path), tensor, where, kind))
    return tuple(slots), tree


def gather(slots: tuple[Slot, ...]) -> list[torch.Tensor]:
    """Return the current tensors of slots, which ``.to``, ``functional_call`` and parametrizations replace."""
    tensors: list[torch.Tensor] = []
    for owner, name in slots:
        tensor: torch.Tensor | None = owner._parameters.get(name)
        if tensor is None:
            tensor = owner._buffers.get(name)
        tensors.append(getattr(owner, name) if tensor is None else tensor)
    return tensors


def dotted_names(slots: tuple[Slot, ...], root: torch.nn.Module) -> list[str]:
    """Return the dotted names of slots, relative to ``root``."""
    prefixes = {id(module): f"{name}." if name else "" for name, module in root.named_modules()}
    return [prefixes.get(id(owner), "") + name for owner, name in slots]


def path_names(path: tuple[Any, ...]) -> list[str]:
    """Return the parts of the dotted name of a leaf, from its path in the pytree."""
    names: list[str] = []
    for entry in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(entry, attribute):
                names.extend(str(getattr(entry, attribute)).split("."))
                break
        else:
            names.append(str(entry))
    return names or [ROOT_NAME]


def _register(module: torch.nn.Module, names: list[str], tensor: torch.Tensor, where: str, kind: str) -> Slot:
    """Register a tensor below a module under the parts of its name, creating modules as needed."""
    full = ".".join(names)
    if "" in names:
        raise ValueError(f"{where}: a parameter's name must not have empty parts, got {full!r}; rename the key")
    for name in names[:-1]:
        if name in module._parameters or name in module._buffers:
            raise ValueError(f"{where}: {full!r} is nested below {name!r}, which is a parameter itself; rename a key")
        # Without add_module and register_parameter, which refuse names of nn.Module's methods, such as `type`.
        child = module._modules.get(name)
        if child is None:
            child = module._modules[name] = torch.nn.Module()
        module = child
    name = names[-1]
    if name in module._parameters or name in module._buffers or name in module._modules:
        raise ValueError(f"{where}: two leaves of {kind} are named {full!r}; rename a key")
    if kind == "params" and (tensor.is_floating_point() or tensor.is_complex()):
        own = tensor if isinstance(tensor, torch.nn.Parameter) else torch.nn.Parameter(tensor)
        module._parameters[name] = own
    else:
        module._buffers[name] = tensor
    return module, name


def _own(leaf: object, where: str, copy: bool) -> torch.Tensor:
    """Return a contiguous copy of an array in torch's memory, which its allocators align to 64 bytes.

    Without ``copy``, a torch tensor is returned itself.
    """
    if isinstance(leaf, torch.Tensor):
        tensor = leaf.detach() if copy else leaf
    elif isinstance(leaf, jax.Array):
        try:
            tensor = to_torch(leaf)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
    elif isinstance(leaf, np.ndarray | np.generic):
        tensor = array_to_tensor(np.asarray(leaf), where)
    else:
        raise TypeError(
            f"{where}: expected a JAX, numpy or torch array, got {type(leaf).__qualname__}; convert a number with "
            "numpy.asarray(x, 'float32'), and bind other values with functools.partial"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{where}: has dtype {tensor.dtype}, which JAX lacks; cast it")
    if tensor.dtype in WIDE and not x64_is_on():
        raise ValueError(
            f"{where}: has dtype {str(tensor.dtype).removeprefix('torch.')}, which JAX supports only with x64 on; turn "
            "it on with jax.config.update('jax_enable_x64', True), or cast the array to 32 bits"
        )
    if tensor is leaf:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def array_to_tensor(array: np.ndarray[Any, Any], where: str) -> torch.Tensor:
    """Return a copy of a numpy array, which may have a dtype that only ml_dtypes defines.

    Raises:
        TypeError: if torch lacks the dtype.
    """
    own = getattr(torch, array.dtype.name, None)
    if not isinstance(own, torch.dtype):
        raise TypeError(f"{where}: torch lacks the dtype {array.dtype.name!r}; cast the array")
    # torch does not know numpy's bfloat16 and float8 of ml_dtypes, so pass their bytes, in native order.
    plain = np.array(array, dtype=array.dtype.newbyteorder("="), order="C").reshape(-1).view(np.uint8)
    return torch.from_numpy(plain).view(own).reshape(array.shape)
