"""A pytree of JAX arrays with a ``state_dict``, for the checkpoints of JAX-led programs."""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import torch

from recis_hybrid.bridge.exchange.dlpack import to_jax, to_torch


class JaxState:
    """A pytree of arrays (parameters, an optax state, a PRNG key) that is saved and restored through ``state_dict``.

    The program reads ``tree`` and assigns new values to it. Arrays are copied only when they are saved.

    Args:
        tree: A pytree of JAX arrays, which may include typed PRNG keys; 64-bit arrays need ``jax_enable_x64``.

    Attributes:
        tree: The current pytree.

    Raises:
        TypeError: if a leaf is not a JAX array.

    Example:
        >>> state = JaxState({"w": jnp.ones(3), "step": jnp.int32(0)})
        >>> state.tree = {"w": state.tree["w"] * 2, "step": state.tree["step"] + 1}
        >>> sorted(state.state_dict())
        ["['step']", "['w']"]
    """

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self._named()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return copies of the leaves, named by their paths in the pytree (``jax.tree_util.keystr``)."""
        return {name: to_torch(_data(leaf), copy=True) for name, leaf in self._named().items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Replace ``tree`` with copies of saved leaves, on the devices of its leaves.

        Args:
            state: The result of :meth:`state_dict` for a pytree of the same structure, shapes and dtypes.

        Raises:
            ValueError: if structure, shapes or dtypes differ; nothing is changed.
        """
        named = self._named()
        own = {name: _describe(_data(leaf)) for name, leaf in named.items()}
        saved = {name: f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for name, each in state.items()}
        if own != saved:
            different = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
            listed = ", ".join(
                f"{name}: saved {saved.get(name, 'nothing')}, expected {own.get(name, 'nothing')}" for name in different
            )
            raise ValueError(
                f"JaxState: the saved state belongs to another pytree ({listed}); load a state of the same structure, "
                "shapes and dtypes"
            )
        leaves = []
        for name, leaf in named.items():
            array = jax.device_put(to_jax(state[name].cpu(), copy=True), leaf.sharding)
            leaves.append(jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array)
        self.tree = jax.tree.unflatten(jax.tree.structure(self.tree), leaves)

    def _named(self) -> dict[str, jax.Array]:
        """Return the leaves of the current pytree by path, after checking that they are arrays."""
        paths, _ = jax.tree_util.tree_flatten_with_path(self.tree)
        named = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
        for name, leaf in named.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(
                    f"JaxState: leaf {name!r} must be a JAX array, got {type(leaf).__qualname__}; convert it with "
                    "jax.numpy.asarray"
                )
        return cast(dict[str, jax.Array], named)


def _is_key(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _data(leaf: jax.Array) -> jax.Array:
    """Return the data of a typed PRNG key, and any other leaf unchanged."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _describe(leaf: jax.Array) -> str:
    return f"{leaf.dtype.name}{list(leaf.shape)}"
