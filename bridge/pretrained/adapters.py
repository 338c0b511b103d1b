"""Low-rank adapters of linear layers (LoRA), as further entries of an encoder's parameters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax

from recis_hybrid.bridge.pretrained.encoder import Weights
from recis_hybrid.bridge.pretrained.layers import ADAPTER, dropout


def with_adapters(weights: Weights, scaling: Mapping[str, float], rate: float, key: jax.Array | None) -> Weights:
    r"""Return an encoder's parameters with adapters, which :func:`layers.linear` applies.

    $$y = W x + b + s B A x$$

    Args:
        weights: Parameters by peft's names: those of an adapted layer below ``base_layer``, and the adapter's as
            ``lora_A.default.weight`` ``[r, in]`` and ``lora_B.default.weight`` ``[out, r]``.
        scaling: The factor $s$ by the name of each adapted layer.
        rate: Dropout rate of the adapters' inputs.
        key: PRNG key for dropout, or None.

    Returns:
        Parameters by the encoder's own names, and functions ``{layer}.adapter`` from inputs to the adapters' outputs.

    References:
        E. Hu et al.: LoRA: Low-rank adaptation of large language models. ICLR 2022.
    """
    adapted: dict[str, Any] = {name.replace(".base_layer.", "."): value for name, value in weights.items()}
    for number, (layer, factor) in enumerate(scaling.items()):
        a, b = (adapted.pop(f"{layer}.lora_{letter}.default.weight") for letter in "AB")
        # The encoder derives its own keys by splitting.
        own_key = None if key is None else jax.random.fold_in(key, number)
        adapted[f"{layer}.{ADAPTER}"] = functools.partial(_low_rank, a, b, factor, rate, own_key)
    return adapted


def _low_rank(a: jax.Array, b: jax.Array, factor: float, rate: float, key: jax.Array | None, x: jax.Array) -> jax.Array:
    """Return an adapter's output, in the dtype of its parameters."""
    return factor * ((dropout(x.astype(a.dtype), rate, key) @ a.T) @ b.T)
