"""Llama, Mistral, Phi-3, Qwen2 and Qwen3 without heads, over the state dicts of ``transformers.LlamaModel`` and so on.

B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recis_hybrid.bridge.pretrained.encoder import Config, Encoder, Output, Shapes, Weights
from recis_hybrid.bridge.pretrained.layers import (
    ACTIVATIONS,
    Activation,
    after_layer,
    attend,
    attention_mask as make_mask,
    dropout,
    embed,
    linear,
    linear_shapes,
    norm_shapes,
    rms_norm,
    split,
    split_heads,
)
from recis_hybrid.bridge.pretrained.rope import Rope, rope, rotate


@dataclass(frozen=True)
class _Decoder:
    """The differences between the families, and sizes."""

    where: str
    size: int
    hidden: int
    count: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    padding_id: int | None
    eps: float
    act: Activation
    rate: float
    """Dropout rate of the attention probabilities."""
    output_rate: float
    """Dropout rate of the output of attention and of the feed-forward network."""
    rope: Rope
    is_causal: bool
    windows: tuple[int | None, ...]
    """The window of attention in each layer, as for :func:`layers.attention_mask`."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    has_head_norms: bool
    is_fused: bool
    """True if one matrix computes queries, keys and values, and another one the inputs of the feed-forward network."""

    def shapes(self) -> Shapes:
        """Return the parameters."""
        inner, key_inner = self.heads * self.head_size, self.key_heads * self.head_size
        shapes: Shapes = {"embed_tokens.weight": (self.vocabulary, self.size)}
        for layer in (f"layers.{number}" for number in range(self.count)):
            attention = f"{layer}.self_attn"
            if self.is_fused:
                shapes |= linear_shapes(f"{attention}.qkv_proj", inner + 2 * key_inner, self.size, bias=False)
                shapes |= linear_shapes(f"{layer}.mlp.gate_up_proj", 2 * self.hidden, self.size, bias=False)
            else:
                for part, size in (("q_proj", inner), ("k_proj", key_inner), ("v_proj", key_inner)):
                    shapes |= linear_shapes(f"{attention}.{part}", size, self.size, bias=self.qkv_bias)
                for part in ("gate_proj", "up_proj"):
                    shapes |= linear_shapes(f"{layer}.mlp.{part}", self.hidden, self.size, bias=self.mlp_bias)
            shapes |= linear_shapes(f"{attention}.o_proj", self.size, inner, bias=self.output_bias)
            if self.has_head_norms:
                shapes |= norm_shapes(f"{attention}.q_norm", self.head_size, bias=False)
                shapes |= norm_shapes(f"{attention}.k_norm", self.head_size, bias=False)
            shapes |= linear_shapes(f"{layer}.mlp.down_proj", self.size, self.hidden, bias=self.mlp_bias)
            shapes |= norm_shapes(f"{layer}.input_layernorm", self.size, bias=False)
            shapes |= norm_shapes(f"{layer}.post_attention_layernorm", self.size, bias=False)
        return shapes | norm_shapes("norm", self.size, bias=False)

    def forward(
        self,
        weights: Weights,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Output:
        """Compute the hidden states of token ids ``[B, T]``."""
        length = input_ids.shape[1]
        self._check(length)
        masks = {
            window: make_mask(attention_mask, length, causal=self.is_causal, window=window, where=self.where)
            for window in set(self.windows)
        }
        x = embed(weights, "embed_tokens", input_ids, self.padding_id)
        rotations = self.rope.rotations(length, x.dtype)
        for number, (window, layer_key) in enumerate(zip(self.windows, split(key, self.count), strict=True)):
            layer = f"layers.{number}"
            attention_key, output_key, network_key = split(layer_key, 3)
            normal = rms_norm(weights, f"{layer}.input_layernorm", x, self.eps)
            mixed = self._attention(weights, f"{layer}.self_attn", normal, rotations, masks[window], attention_key)
            x += dropout(mixed, self.output_rate, output_key)
            normal = rms_norm(weights, f"{layer}.post_attention_layernorm", x, self.eps)
            gate, up = self._gate_and_up(weights, f"{layer}.mlp", normal)
            output = linear(weights, f"{layer}.mlp.down_proj", self.act(gate) * up)
            x = after_layer(x + dropout(output, self.output_rate, network_key))
        return Output(rms_norm(weights, "norm", x, self.eps), None)

    def _attention(
        self,
        weights: Weights,
        name: str,
        x: jax.Array,
        rotations: tuple[jax.Array, jax.Array],
        mask: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        queries, keys, values = self._queries_keys_values(weights, name, x)
        if self.has_head_norms:
            queries = rms_norm(weights, f"{name}.q_norm", queries, self.eps)
            keys = rms_norm(weights, f"{name}.k_norm", keys, self.eps)
        queries, keys = rotate(queries, rotations), rotate(keys, rotations)
        attended = attend(queries, keys, values, mask, rate=self.rate, dropout_key=key)
        return linear(weights, f"{name}.o_proj", attended)

    def _queries_keys_values(self, weights: Weights, name: str, x: jax.Array) -> Iterator[jax.Array]:
        """Return the queries ``[B, T, heads, D]``, and keys and values ``[B, T, key_heads, D]``."""
        if self.is_fused:
            ends = np.cumsum([self.heads, self.key_heads]) * self.head_size
            parts = jnp.split(linear(weights, f"{name}.qkv_proj", x), ends, -1)
        else:
            parts = [linear(weights, f"{name}.{part}", x) for part in ("q_proj", "k_proj", "v_proj")]
        return map(split_heads, parts, (self.heads, self.key_heads, self.key_heads))

    def _gate_and_up(self, weights: Weights, name: str, x: jax.Array) -> Sequence[jax.Array]:
        """Return the two inputs of the feed-forward network's product, ``[B, T, hidden]``."""
        if self.is_fused:
            return jnp.split(linear(weights, f"{name}.gate_up_proj", x), 2, -1)
        return [linear(weights, f"{name}.{part}", x) for part in ("gate_proj", "up_proj")]

    def _check(self, length: int) -> None:
        """Refuse lengths at which the result would differ from that of transformers."""
        if self.rope.limit is not None and length > self.rope.limit:
            raise ValueError(
                f"{self.where}: {length} tokens are more than {self.rope.limit}, beyond which this rope_type is not "
                "implemented; truncate the inputs"
            )


def llama(config: Config) -> Encoder:
    """Return a Llama: ``forward(weights, input_ids, attention_mask)``, both ``[B, T]``.

    References:
        H. Touvron et al.: LLaMA: Open and efficient foundation language models. arXiv 2302.13971, 2023.
    """
    bias = config.flag("attention_bias", False)
    return _decoder(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias", False))


def mistral(config: Config) -> Encoder:
    """Return a Mistral: ``forward(weights, input_ids, attention_mask)``, both ``[B, T]``.

    References:
        A. Q. Jiang et al.: Mistral 7B. arXiv 2310.06825, 2023.
    """
    windows = _windows(config, config.size("num_hidden_layers", 32), 4096)
    return _decoder(config, hidden=14336, key_heads=8, length=131072, windows=windows)


def phi3(config: Config) -> Encoder:
    """Return a Phi-3: ``forward(weights, input_ids, attention_mask)``, both ``[B, T]``.

    References:
        M. Abdin et al.: Phi-3 technical report: A highly capable language model locally on your phone. arXiv
        2404.14219, 2024.
    """
    return _decoder(
        config,
        vocabulary=32064,
        size=3072,
        hidden=8192,
        length=4096,
        original_length=4096,
        padding_id=32000,
        eps=1e-5,
        output_rate=config.rate("resid_pdrop", 0.0),
        windows=_windows(config, config.size("num_hidden_layers", 32), None),
        is_fused=True,
    )


def qwen2(config: Config) -> Encoder:
    """Return a Qwen2: ``forward(weights, input_ids, attention_mask)``, both ``[B, T]``.

    References:
        A. Yang et al.: Qwen2 technical report. arXiv 2407.10671, 2024.
    """
    return _qwen(config, qkv_bias=True)


def qwen3(config: Config) -> Encoder:
    """Return a Qwen3: ``forward(weights, input_ids, attention_mask)``, both ``[B, T]``.

    References:
        A. Yang et al.: Qwen3 technical report. arXiv 2505.09388, 2025.
    """
    bias = config.flag("attention_bias", False)
    return _qwen(config, head_size=128, qkv_bias=bias, output_bias=bias, has_head_norms=True)


def _qwen(config: Config, **differences: Any) -> Encoder:
    """Return a Qwen of either generation."""
    count = config.size("num_hidden_layers", 32)
    uses_windows = config.flag("use_sliding_window", False)
    windows = _windows(config, count, 4096) if uses_windows else (None,) * count
    kinds = config.fields.get("layer_types")
    if kinds is None:
        first = config.token("max_window_layers", 28) or 0
        kinds = ["full_attention" if number < first else "sliding_attention" for number in range(count)]
    elif len(kinds) != count or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{config.where}: layer_types must be {count} of full_attention and sliding_attention, got {kinds}"
        )
    elif "sliding_attention" in kinds and None in windows:
        raise ValueError(
            f"{config.where}: layer_types has sliding_attention without use_sliding_window and sliding_window"
        )
    chosen = (window if kind == "sliding_attention" else None for window, kind in zip(windows, kinds, strict=True))
    return _decoder(
        config, vocabulary=151936, hidden=22016, key_heads=32, length=32768, windows=tuple(chosen), **differences
    )


def _windows(config: Config, count: int, default: int | None) -> tuple[int | None, ...]:
    """Return ``sliding_window`` for each of so many layers."""
    window = config.token("sliding_window", default)
    if window is not None and window < 1:
        raise ValueError(f"{config.where}: sliding_window must be positive or null, got {window}")
    return (window,) * count


def _decoder(
    config: Config,
    *,
    vocabulary: int = 32000,
    size: int = 4096,
    hidden: int = 11008,
    key_heads: int | None = None,
    head_size: int | None = None,
    length: int = 2048,
    original_length: int | None = None,
    padding_id: int | None = None,
    eps: float = 1e-6,
    output_rate: float = 0.0,
    windows: tuple[int | None, ...] | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    has_head_norms: bool = False,
    is_fused: bool = False,
) -> Encoder:
    """Return a decoder from its configuration, with the family's defaults and differences."""
    size = config.size("hidden_size", size)
    count, heads = config.size("num_hidden_layers", 32), config.size("num_attention_heads", 32)
    if head_size is None and config.fields.get("head_dim") is None:
        head_size = size // config.heads(size, 32)
    head_size = config.size("head_dim", head_size or 0)
    # Null means as many as query heads, whereas a missing field has the family's default.
    key_heads = config.size(
        "num_key_value_heads", heads if "num_key_value_heads" in config.fields else key_heads or heads
    )
    if heads % key_heads:
        raise ValueError(
            f"{config.where}: num_attention_heads {heads} must be a multiple of num_key_value_heads {key_heads}"
        )
    decoder = _Decoder(
        where=config.where,
        size=size,
        hidden=config.size("intermediate_size", hidden),
        count=count,
        heads=heads,
        key_heads=key_heads,
        head_size=head_size,
        vocabulary=config.size("vocab_size", vocabulary),
        padding_id=config.token("pad_token_id", padding_id),
        eps=config.number("rms_norm_eps", eps),
        act=config.choice("hidden_act", ACTIVATIONS, "silu"),
        rate=config.rate("attention_dropout", 0.0),
        output_rate=output_rate,
        rope=rope(
            config,
            head_size,
            config.size("max_position_embeddings", length),
            original=original_length,
            is_partial=is_fused,
        ),
        is_causal=config.flag("is_causal", True),
        windows=windows or (None,) * count,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        has_head_norms=has_head_norms,
        is_fused=is_fused,
    )
    return Encoder(
        name=config.name,
        weights=decoder.shapes(),
        inputs=("input_ids", "attention_mask"),
        max_length=decoder.rope.limit,
        threshold=decoder.rope.threshold,
        prefixes=("model.",),
        forward=decoder.forward,
    )
