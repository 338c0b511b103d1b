"""A pytree of JAX arrays as an object with a state_dict: what a JAX-led program keeps, for a checkpoint."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import torch

from recis_hybrid.bridge.dlpack import to_jax, to_torch


class JaxState:
    """Holds a pytree of arrays (parameters, an optax state, a PRNG key) for whoever saves and restores by state_dict.

    The program takes `tree` from it and puts the next one back; the arrays are not copied until they are saved.

    Args:
        tree: a pytree of JAX arrays, typed PRNG keys among them; of 64 bits only with `jax_enable_x64`.

    Attributes:
        tree: the pytree as it is now.

    Raises:
        TypeError: if a leaf is no JAX array.

    Example:
        >>> held = JaxState({"w": jnp.ones(3), "step": jnp.int32(0)})
        >>> held.tree = {"w": held.tree["w"] * 2, "step": held.tree["step"] + 1}
        >>> sorted(held.state_dict())
        ["['step']", "['w']"]
    """

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self._named()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return copies of the leaves, by their paths in the pytree (`jax.tree_util.keystr`)."""
        return {name: to_torch(_plain(leaf), copy=True) for name, leaf in self._named().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put copies of saved leaves into `tree`, in its structure and on the devices of its leaves.

        Args:
            state: what :meth:`state_dict` returned, for a pytree of the same structure, shapes and dtypes.

        Raises:
            ValueError: if it is of another pytree; nothing is changed.
        """
        named = self._named()
        own = {name: _described(_plain(leaf)) for name, leaf in named.items()}
        theirs = {name: f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for name, each in state.items()}
        if own != theirs:
            differ = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
            listed = ", ".join(
                f"{name}: {theirs.get(name, 'nothing')} for {own.get(name, 'nothing')}" for name in differ
            )
            raise ValueError(f"JaxState: the saved state is of another pytree ({listed}); load what was saved from one")
        leaves = []
        for name, leaf in named.items():
            array = jax.device_put(to_jax(state[name].cpu(), copy=True), leaf.sharding)
            leaves.append(jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array)
        self.tree = jax.tree.unflatten(jax.tree.structure(self.tree), leaves)

    def _named(self) -> dict[str, jax.Array]:
        paths, _ = jax.tree_util.tree_flatten_with_path(self.tree)
        named = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
        for name, leaf in named.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(
                    f"JaxState: the leaf {name or 'itself'} must be a JAX array, got a {type(leaf).__qualname__}; wrap "
                    "it by jax.numpy.asarray"
                )
        return cast(dict[str, jax.Array], named)


def _is_key(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _plain(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _described(leaf: jax.Array) -> str:
    return f"{leaf.dtype.name}{list(leaf.shape)}"
