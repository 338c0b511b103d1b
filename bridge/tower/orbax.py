"""Parameters of towers from and to Orbax checkpoints, the format of Flax and of many Equinox programs.

Checkpoints are matched by dotted names, so that those of ``nnx.state``, of linen variables, of their ``params`` alone,
and of pytrees of Equinox modules load alike. Orbax is imported on first use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from recis_hybrid.bridge.exchange.dlpack import share
from recis_hybrid.bridge.tower._parameters import array_to_tensor, dotted_names, gather, path_names
from recis_hybrid.bridge.tower.tower import JaxTower

_LISTED = 5
"""The number of names that an error lists."""
_METADATA = "_METADATA"
"""A file that every Orbax checkpoint of a pytree has."""
_ITEM = "default"
"""The folder of the pytree in a step of ``orbax.checkpoint.CheckpointManager``."""


def load_orbax(tower: JaxTower, path: str | os.PathLike[str], *, key: str = "") -> None:
    """Load the parameters and the state of a tower from an Orbax checkpoint of the same model.

    All arrays are read on the CPU and compared before anything is changed. Floating-point values are converted to the
    tower's dtypes. Random keys and counters of nnx are ignored, because a tower draws keys from torch's generator.

    Args:
        tower: The tower, from :func:`from_nnx`, :func:`from_linen`, :func:`from_equinox`, or of any pytree with the
            same keys.
        path: The folder of the checkpoint, such as that of ``StandardCheckpointer.save``, or of a step of a
            ``CheckpointManager``.
        key: The dotted path of the model in the checkpoint, such as "model.params", if it also contains other things.

    Raises:
        FileNotFoundError: if the folder is not an Orbax checkpoint.
        ImportError: if orbax-checkpoint is not installed.
        ValueError: if names, shapes or dtypes differ, or the checkpoint has nothing at ``key``.

    Example:
        ::

            tower = from_linen(module, module.init(jax.random.key(0), x))
            load_orbax(tower, "run/100", key="params")
    """
    where = f"load_orbax: {os.fspath(path)}"
    saved = _named(_read(Path(path).absolute(), where), key, where)
    slots = (*tower._slots, *tower._state_slots)
    live = dict(zip(dotted_names(slots, tower), gather(slots), strict=True))
    # The parameters of linen are a collection beside the others.
    saved = {name if name in live else name.removeprefix("params."): value for name, value in saved.items()}
    for what, some in (("lacks", live.keys() - saved.keys()), ("also has", saved.keys() - live.keys())):
        if some:
            raise ValueError(
                f"{where}: the checkpoint {what} {_some(sorted(some))}; it has {_some(sorted(saved))}, and the tower "
                f"{_some(sorted(live))}; build the tower of the same model, or pass key= for a part of the checkpoint"
            )
    tensors = {name: _fitting(saved[name], tensor, f"{where}: {name!r}") for name, tensor in live.items()}
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(tensors[name])


def save_orbax(tower: JaxTower, path: str | os.PathLike[str]) -> None:
    """Save the parameters and the state of a tower as an Orbax checkpoint.

    Its pytree is the one that the tower was built from: for :func:`from_linen` the variables, with the collection
    "params"; for :func:`from_nnx` the pure dictionary of all parameters and statistics; for :func:`from_equinox` the
    module's floating-point arrays. The checkpoint is complete when the function returns.

    Args:
        tower: The tower.
        path: The folder to create.

    Raises:
        FileExistsError: if the folder exists.
        ImportError: if orbax-checkpoint is not installed.
    """
    if Path(path).exists():
        raise FileExistsError(f"save_orbax: {os.fspath(path)} exists; save to a new folder")
    ocp = _import_orbax("save_orbax")
    arrays = [share(tensor.detach().contiguous()) for tensor in gather(tower._slots)]
    params = jax.tree.unflatten(tower._runner.programs.params_tree, arrays)
    state = None
    if tower._state_tree is not None:
        arrays = [share(tensor.contiguous()) for tensor in gather(tower._state_slots)]
        state = jax.tree.unflatten(tower._state_tree, arrays)
    tree = params if tower.to_checkpoint is None else tower.to_checkpoint(params, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(path).absolute(), tree)


def _read(path: Path, where: str) -> Any:
    """Return the pytree of a checkpoint as nested dictionaries and lists of numpy arrays."""
    ocp = _import_orbax("load_orbax")
    if (path / _ITEM / _METADATA).is_file():
        path = path / _ITEM
    if not (path / _METADATA).is_file():
        steps = sorted(each.name for each in path.glob("*") if each.name.isdigit())
        hint = f"it contains the steps {_some(steps)}: pass one of them" if steps else "pass the folder of a pytree"
        raise FileNotFoundError(f"{where}: is not an Orbax checkpoint; {hint}")
    with ocp.PyTreeCheckpointer() as checkpointer:
        described = checkpointer.metadata(path)
        described = getattr(getattr(described, "item_metadata", described), "tree", described)
        # As numpy arrays, because the devices that wrote the checkpoint may not be present here.
        arguments = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), described, is_leaf=lambda leaf: hasattr(leaf, "dtype")
        )
        return checkpointer.restore(path, restore_args=arguments)


def _named(tree: Any, key: str, where: str) -> dict[str, Any]:
    """Return the arrays of a checkpoint by dotted name below a key, without random streams."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {".".join(path_names(path)): value for path, value in leaves}
    if key:
        prefix = f"{key}."
        below = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
        if not below:
            raise ValueError(f"{where}: has nothing at the key {key!r}; it has {_some(sorted(named))}")
        named = below
    # nnx saves each variable as a dictionary with the key "value".
    if named and all(name.endswith(".value") for name in named):
        named = {name.removesuffix(".value"): value for name, value in named.items()}
    # A random stream of nnx has a key and a counter.
    streams = {name.removesuffix(".key") for name in named if f"{name.removesuffix('.key')}.count" in named}
    return {name: value for name, value in named.items() if name.rpartition(".")[0] not in streams}


def _fitting(value: Any, live: torch.Tensor, where: str) -> torch.Tensor:
    """Return an array of a checkpoint as a tensor, after comparing it with the live one."""
    tensor = array_to_tensor(np.asarray(value), where)
    if tensor.shape != live.shape:
        raise ValueError(f"{where} has shape {list(tensor.shape)}, but that of the tower {list(live.shape)}")
    if tensor.dtype != live.dtype and not (tensor.is_floating_point() and live.is_floating_point()):
        raise ValueError(f"{where} has dtype {tensor.dtype}, but that of the tower {live.dtype}")
    return tensor


def _some(names: list[str]) -> str:
    others = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + others


def _import_orbax(where: str) -> Any:
    try:
        import orbax.checkpoint
    except ModuleNotFoundError as error:
        raise ImportError(f"{where}: requires {error.name!r}; run `pip install orbax-checkpoint`") from error
    return orbax.checkpoint


def linen_variables(params: Any, state: Mapping[str, Any] | None) -> Any:
    """Return the variables of a linen module: its parameters, and its other collections."""
    return {"params": params, **(state or {})}


def merged(params: Any, state: Any) -> Any:
    """Return one nested dictionary of the parameters and the state of an nnx module."""
    if not isinstance(params, dict) or not isinstance(state, dict):
        return params if state is None else state
    return {
        key: merged(params[key], state[key]) if key in params and key in state else {**params, **state}[key]
        for key in params | state
    }
