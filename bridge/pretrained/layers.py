"""Layers of transformers over flat state dicts: ``name`` is the prefix of the layer's parameters.

B batch, T tokens (queries), S tokens (keys), H attention heads or hidden size, K heads of keys and values, D head
size, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from recis_hybrid.bridge.pretrained.encoder import Shapes, Weights

Activation = Callable[[jax.Array], jax.Array]


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


ADAPTER: Final = "adapter"
"""The name of a layer's adapter among its parameters: a function of the layer's input that is added to its output."""
COMPUTE: Final = "compute_dtype"
"""The name among parameters of the dtype that linear layers and attention compute in, whatever that of the parameters,
as in ``torch.autocast``."""
_LAYER: Final = "layer"
ONLY_LAYERS: Final = jax.checkpoint_policies.save_only_these_names(_LAYER)
"""A policy of ``jax.checkpoint`` that saves the hidden states after each layer, and recomputes all others."""
ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "gelu": _gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "mish": jax.nn.mish,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Activations by the names of transformers."""


def linear(weights: Weights, name: str, x: jax.Array) -> jax.Array:
    """Return ``x @ weight.T + bias``, without the bias if there is none, and with the layer's adapter if there is one.

    Args:
        weights: Parameters, with ``{name}.weight`` ``[out, in]`` and perhaps ``{name}.bias`` ``[out]``.
        name: The layer.
        x: ``[..., in]``.

    Returns:
        ``[..., out]``.
    """
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    dtype: Any = weights.get(COMPUTE, weight.dtype)
    y = jax.lax.dot_general(x.astype(dtype), weight.astype(dtype), (((x.ndim - 1,), (1,)), ((), ())))
    y = y if bias is None else y + bias.astype(dtype)
    adapter: Any = weights.get(f"{name}.{ADAPTER}")
    return y if adapter is None else (y + adapter(x)).astype(y.dtype)


def linear_shapes(name: str, size: int, inputs: int, *, bias: bool = True) -> Shapes:
    """Return the parameters of :func:`linear` with ``size`` outputs."""
    weight: Shapes = {f"{name}.weight": (size, inputs)}
    return weight | {f"{name}.bias": (size,)} if bias else weight


def layer_norm(weights: Weights, name: str, x: jax.Array, eps: float) -> jax.Array:
    """Normalize the last dimension to mean 0 and variance 1, computing in at least float32.

    References:
        J. L. Ba, J. R. Kiros, G. E. Hinton: Layer normalization. arXiv 1607.06450, 2016.
    """
    wide = _widen(x)
    centered = wide - wide.mean(-1, keepdims=True)
    normal = centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)
    return (normal * weights[f"{name}.weight"] + weights[f"{name}.bias"]).astype(x.dtype)


def norm_shapes(name: str, size: int, *, bias: bool = True) -> Shapes:
    """Return the parameters of :func:`layer_norm`, or without bias those of :func:`rms_norm`."""
    return {f"{name}.{part}": (size,) for part in (["weight", "bias"] if bias else ["weight"])}


def rms_norm(weights: Weights, name: str, x: jax.Array, eps: float) -> jax.Array:
    """Divide the last dimension by its root mean square, computing in at least float32.

    References:
        B. Zhang, R. Sennrich: Root mean square layer normalization. NeurIPS 2019.
    """
    wide = _widen(x)
    normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return weights[f"{name}.weight"] * normal.astype(x.dtype)


def embed(weights: Weights, name: str, ids: jax.Array, padding_id: int | None = None) -> jax.Array:
    """Return rows of an embedding, NaN for ids outside of it.

    Args:
        weights: Parameters, with ``{name}.weight`` ``[V, H]``.
        name: The layer.
        ids: ``[...]``, integers.
        padding_id: An id whose row gets no gradient, as in ``torch.nn.Embedding``; negative ones count from the end.

    Returns:
        ``[..., H]``.

    Raises:
        ValueError: if there is no row of ``padding_id``.
    """
    table = weights[f"{name}.weight"]
    size = table.shape[0]
    if padding_id is not None and not -size <= padding_id < size:
        raise ValueError(
            f"{name}: pad_token_id must be from {-size} to {size - 1}, because there are {size} rows, got {padding_id}"
        )
    rows = table.at[ids].get(mode="fill", fill_value=np.nan, wrap_negative_indices=False)
    if padding_id is None:
        return rows
    return jnp.where((ids == padding_id % size)[..., None], jax.lax.stop_gradient(rows), rows)


def patch_shapes(name: str, size: int, channels: int, patch: tuple[int, int], *, bias: bool = True) -> Shapes:
    """Return the parameters of :func:`patches` with ``size`` outputs."""
    return {**linear_shapes(name, size, 1, bias=bias), f"{name}.weight": (size, channels, *patch)}


def patches(weights: Weights, name: str, pixels: jax.Array, image: tuple[int, int], where: str) -> jax.Array:
    """Return embeddings of the patches of images, row by row: a convolution whose stride is the size of its kernel.

    Args:
        weights: Parameters, with ``{name}.weight`` ``[H, C, height, width]`` of a patch and perhaps ``{name}.bias``.
        name: The layer.
        pixels: ``[B, C, height, width]``, of any dtype. Rows and columns that do not fill a patch are left out.
        image: Height and width.
        where: The prefix of error messages.

    Returns:
        ``[B, patches, H]``.

    Raises:
        ValueError: if the pixels have another shape.
    """
    kernel = weights[f"{name}.weight"]
    channels, height, width = kernel.shape[1:]
    if pixels.ndim != 4 or pixels.shape[1:] != (channels, *image):
        raise ValueError(
            f"{where}: pixel_values must have shape [batch, {channels}, {image[0]}, {image[1]}], got "
            f"{list(pixels.shape)}; resize the images"
        )
    rows, columns = image[0] // height, image[1] // width
    whole = pixels[:, :, : rows * height, : columns * width].astype(kernel.dtype)
    grid = whole.reshape(pixels.shape[0], channels, rows, height, columns, width)
    flat = grid.transpose(0, 2, 4, 1, 3, 5).reshape(pixels.shape[0], rows * columns, channels * height * width)
    flattened = {f"{name}.weight": kernel.reshape(kernel.shape[0], -1)}
    if f"{name}.bias" in weights:
        flattened[f"{name}.bias"] = weights[f"{name}.bias"]
    if COMPUTE in weights:
        flattened[COMPUTE] = weights[COMPUTE]
    return linear(flattened, name, flat)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Set elements to zero with a probability and scale the others to keep the mean.

    Args:
        x: Any shape.
        rate: The probability, less than 1.
        key: A PRNG key; None returns ``x``.

    References:
        N. Srivastava et al.: Dropout: a simple way to prevent neural networks from overfitting. JMLR 2014.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def after_layer(x: jax.Array) -> jax.Array:
    """Return the hidden states after a layer, marked for :data:`ONLY_LAYERS`."""
    marked: jax.Array = cast(Any, checkpoint_name)(x, _LAYER)
    return marked


def split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Return ``count`` independent keys, or as many times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """Reshape ``[B, T, heads * D]`` to ``[B, T, heads, D]``."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def attention_mask(
    mask: jax.Array | None, length: int, *, causal: bool, window: int | None = None, where: str
) -> jax.Array | None:
    """Return the mask for :func:`attend`.

    Args:
        mask: ``[B, S]``, nonzero for tokens and zero for padding, on either side; None without padding.
        length: ``T = S``.
        causal: Whether a token attends only to itself and earlier ones.
        window: Limits causal attention to the last ``window`` tokens including the token itself, and full attention to
            tokens at a distance of at most ``window``, as in transformers; None for no limit.
        where: The prefix of error messages.

    Returns:
        Bool, broadcastable to ``[B, T, S]``; None if all tokens attend to all.

    Raises:
        ValueError: if the mask is not two-dimensional, or has another length.
    """
    if mask is not None and (mask.ndim != 2 or mask.shape[1] != length):
        raise ValueError(f"{where}: attention_mask must have shape [batch, {length}], got {list(mask.shape)}")
    keys = None if mask is None else (mask != 0)[:, None, :]
    if not causal and window is None:
        return keys
    positions = jnp.arange(length)
    distance = positions[:, None] - positions
    near = distance >= 0 if causal else jnp.ones_like(distance, bool)
    if window is not None:
        near &= distance < window if causal else jnp.abs(distance) <= window
    return near[None] if keys is None else near[None] & keys


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    r"""Return scaled dot-product attention, with softmax in at least float32.

    $$\mathrm{softmax}(Q K^\top / \sqrt{D}) V$$

    Groups of ``H / K`` consecutive query heads share a head of keys and values.

    Args:
        query: ``[B, T, H, D]``.
        key: ``[B, S, K, D]``.
        value: ``[B, S, K, D]``. Its dtype is that of the products.
        mask: Bool, broadcastable to ``[B, T, S]``, True where a query attends to a key; a query that attends to none
            gets the mean of all values.
        rate: Dropout rate of the attention probabilities.
        dropout_key: A PRNG key for dropout, or None.

    Returns:
        ``[B, T, H * D]``.

    References:
        A. Vaswani et al.: Attention is all you need. NeurIPS 2017.
        J. Ainslie et al.: GQA: Training generalized multi-query transformer models from multi-head checkpoints. EMNLP
        2023.
    """
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    grouped, key = grouped.astype(value.dtype), key.astype(value.dtype)
    wide = jnp.promote_types(value.dtype, jnp.float32)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=wide) / math.sqrt(size)
    if mask is not None:
        # Added as in transformers, so that queries without keys have its gradients too; -inf would give them NaN.
        scores += jnp.where(mask, 0, np.finfo(wide).min).astype(wide)[:, None, None]
    probabilities = dropout(jax.nn.softmax(scores, -1).astype(value.dtype), rate, dropout_key)
    return jnp.einsum("bkgts,bskd->btkgd", probabilities, value).reshape(batch, length, heads * size)


def _widen(x: jax.Array) -> jax.Array:
    """Return the array in at least float32."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
