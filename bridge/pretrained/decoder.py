"""Llama, Mistral, Qwen2 and Qwen3 without their heads, over the state dicts of ``transformers.LlamaModel`` and so on.

B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from recis_hybrid.bridge.pretrained.encoder import Config, Encoder, Output, Shapes, Weights
from recis_hybrid.bridge.pretrained.layers import (
    ACTIVATIONS,
    Activation,
    after_layer,
    attend,
    attention_mask as make_mask,
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
    rope: Rope
    is_causal: bool
    window: int | None
    """The number of tokens that each token attends to in some layer; None without such layers."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    has_head_norms: bool

    def shapes(self) -> Shapes:
        """Return the parameters."""
        inner, key_inner = self.heads * self.head_size, self.key_heads * self.head_size
        shapes: Shapes = {"embed_tokens.weight": (self.vocabulary, self.size)}
        for layer in (f"layers.{number}" for number in range(self.count)):
            attention = f"{layer}.self_attn"
            shapes |= linear_shapes(f"{attention}.q_proj", inner, self.size, bias=self.qkv_bias)
            shapes |= linear_shapes(f"{attention}.k_proj", key_inner, self.size, bias=self.qkv_bias)
            shapes |= linear_shapes(f"{attention}.v_proj", key_inner, self.size, bias=self.qkv_bias)
            shapes |= linear_shapes(f"{attention}.o_proj", self.size, inner, bias=self.output_bias)
            if self.has_head_norms:
                shapes |= norm_shapes(f"{attention}.q_norm", self.head_size, bias=False)
                shapes |= norm_shapes(f"{attention}.k_norm", self.head_size, bias=False)
            for part in ("gate_proj", "up_proj"):
                shapes |= linear_shapes(f"{layer}.mlp.{part}", self.hidden, self.size, bias=self.mlp_bias)
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
        mask = make_mask(attention_mask, length, causal=self.is_causal, where=self.where)
        x = embed(weights, "embed_tokens", input_ids, self.padding_id)
        rotations = self.rope.rotations(length, x.dtype)
        for number, layer_key in enumerate(split(key, self.count)):
            layer = f"layers.{number}"
            normal = rms_norm(weights, f"{layer}.input_layernorm", x, self.eps)
            x += self._attention(weights, f"{layer}.self_attn", normal, rotations, mask, layer_key)
            normal = rms_norm(weights, f"{layer}.post_attention_layernorm", x, self.eps)
            gate = self.act(linear(weights, f"{layer}.mlp.gate_proj", normal))
            gated = gate * linear(weights, f"{layer}.mlp.up_proj", normal)
            x = after_layer(x + linear(weights, f"{layer}.mlp.down_proj", gated))
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
        queries = split_heads(linear(weights, f"{name}.q_proj", x), self.heads)
        keys = split_heads(linear(weights, f"{name}.k_proj", x), self.key_heads)
        values = split_heads(linear(weights, f"{name}.v_proj", x), self.key_heads)
        if self.has_head_norms:
            queries = rms_norm(weights, f"{name}.q_norm", queries, self.eps)
            keys = rms_norm(weights, f"{name}.k_norm", keys, self.eps)
        queries, keys = rotate(queries, rotations), rotate(keys, rotations)
        attended = attend(queries, keys, values, mask, rate=self.rate, dropout_key=key)
        return linear(weights, f"{name}.o_proj", attended)

    def _check(self, length: int) -> None:
        """Refuse lengths at which the result would differ from that of transformers."""
        if self.rope.limit is not None and length > self.rope.limit:
            raise ValueError(
                f"{self.where}: {length} tokens are more than max_position_embeddings {self.rope.limit}, beyond which "
                "rope_type 'dynamic' is not implemented; truncate the inputs"
            )
        if self.window is not None and length > self.window:
            raise ValueError(
                f"{self.where}: {length} tokens are more than sliding_window {self.window}, beyond which "
                "sliding windows are not implemented; truncate the inputs"
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
    return _decoder(config, hidden=14336, key_heads=8, length=131072, window=config.token("sliding_window", 4096))


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
    window = config.token("sliding_window", 4096) if config.flag("use_sliding_window", False) else None
    count = config.size("num_hidden_layers", 32)
    kinds = config.fields.get("layer_types")
    if kinds is None:
        first = config.token("max_window_layers", 28) or 0
        kinds = [
            "full_attention" if window is None or number < first else "sliding_attention" for number in range(count)
        ]
    if len(kinds) != count or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{config.where}: layer_types must be {count} of full_attention and sliding_attention, got {kinds}"
        )
    if "sliding_attention" not in kinds:
        window = None
    elif window is None:
        raise ValueError(f"{config.where}: layer_types has sliding_attention without use_sliding_window")
    return _decoder(config, vocabulary=151936, hidden=22016, key_heads=32, length=32768, window=window, **differences)


def _decoder(
    config: Config,
    *,
    vocabulary: int = 32000,
    hidden: int = 11008,
    key_heads: int | None = None,
    head_size: int | None = None,
    length: int = 2048,
    window: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    has_head_norms: bool = False,
) -> Encoder:
    """Return a decoder from its configuration, with the family's defaults and differences."""
    size = config.size("hidden_size", 4096)
    heads = config.size("num_attention_heads", 32)
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
        count=config.size("num_hidden_layers", 32),
        heads=heads,
        key_heads=key_heads,
        head_size=head_size,
        vocabulary=config.size("vocab_size", vocabulary),
        padding_id=config.token("pad_token_id", None),
        eps=config.number("rms_norm_eps", 1e-6),
        act=config.choice("hidden_act", ACTIVATIONS, "silu"),
        rate=config.rate("attention_dropout", 0.0),
        rope=rope(config, head_size, config.size("max_position_embeddings", length)),
        is_causal=config.flag("is_causal", True),
        window=window,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        has_head_norms=has_head_norms,
    )
    return Encoder(
        name=config.name,
        weights=decoder.shapes(),
        inputs=("input_ids", "attention_mask"),
        max_length=min((limit for limit in (decoder.rope.limit, window) if limit is not None), default=None),
        prefixes=("model.",),
        forward=decoder.forward,
    )
