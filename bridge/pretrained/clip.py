"""The text and vision encoders of CLIP, over the state dicts of ``transformers.CLIPTextModel`` and ``CLIPVisionModel``.

B batch, T tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from recis_hybrid.bridge.pretrained.encoder import Config, Encoder, Output, Shapes, Weights
from recis_hybrid.bridge.pretrained.layers import (
    ACTIVATIONS,
    Activation,
    after_layer,
    attend,
    attention_mask as make_mask,
    embed,
    layer_norm,
    linear,
    linear_shapes,
    norm_shapes,
    patch_shapes,
    patches,
    split,
    split_heads,
)

_EARLY_END = 2
"""The ``eos_token_id`` of early configurations, whose vocabulary has another one: its largest id."""


@dataclass(frozen=True)
class _Layers:
    """The layers that both encoders have."""

    size: int
    hidden: int
    count: int
    heads: int
    eps: float
    act: Activation
    rate: float

    def shapes(self) -> Shapes:
        """Return the parameters."""
        shapes: Shapes = {}
        for layer in (f"encoder.layers.{number}" for number in range(self.count)):
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear_shapes(f"{layer}.self_attn.{part}", self.size, self.size)
            shapes |= linear_shapes(f"{layer}.mlp.fc1", self.hidden, self.size)
            shapes |= linear_shapes(f"{layer}.mlp.fc2", self.size, self.hidden)
            shapes |= norm_shapes(f"{layer}.layer_norm1", self.size) | norm_shapes(f"{layer}.layer_norm2", self.size)
        return shapes

    def run(self, weights: Weights, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """Return the hidden states ``[B, T, H]`` after all layers."""
        for number, layer_key in enumerate(split(key, self.count)):
            layer = f"encoder.layers.{number}"
            normal = layer_norm(weights, f"{layer}.layer_norm1", x, self.eps)
            q, k, v = (
                split_heads(linear(weights, f"{layer}.self_attn.{part}", normal), self.heads)
                for part in ("q_proj", "k_proj", "v_proj")
            )
            attended = attend(q, k, v, mask, rate=self.rate, dropout_key=layer_key)
            x += linear(weights, f"{layer}.self_attn.out_proj", attended)
            normal = layer_norm(weights, f"{layer}.layer_norm2", x, self.eps)
            hidden = self.act(linear(weights, f"{layer}.mlp.fc1", normal))
            x = after_layer(x + linear(weights, f"{layer}.mlp.fc2", hidden))
        return x


def _layers(config: Config, size: int, hidden: int, heads: int) -> _Layers:
    """Return the layers of a configuration, with the defaults of an encoder."""
    size = config.size("hidden_size", size)
    return _Layers(
        size=size,
        hidden=config.size("intermediate_size", hidden),
        count=config.size("num_hidden_layers", 12),
        heads=config.heads(size, heads),
        eps=config.number("layer_norm_eps", 1e-5),
        act=config.choice("hidden_act", ACTIVATIONS, "quick_gelu"),
        rate=config.rate("attention_dropout", 0.0),
    )


def clip_vision(config: Config) -> Encoder:
    """Return CLIP's vision encoder: ``forward(weights, pixel_values)`` with pixels ``[B, C, Y, X]``, float.

    The hidden states come before the last normalization, the pooled output, that of the class token, after it. The
    projection into the space of text and images is not part of the encoder.

    References:
        A. Radford et al.: Learning transferable visual models from natural language supervision. ICML 2021.
    """
    layers = _layers(config, 768, 3072, 12)
    channels = config.size("num_channels", 3)
    image, patch = config.size("image_size", 224), config.size("patch_size", 32)
    shapes: Shapes = {
        "embeddings.class_embedding": (layers.size,),
        "embeddings.position_embedding.weight": (1 + (image // patch) ** 2, layers.size),
    }
    shapes |= patch_shapes("embeddings.patch_embedding", layers.size, channels, (patch, patch), bias=False)
    shapes |= norm_shapes("pre_layrnorm", layers.size) | layers.shapes() | norm_shapes("post_layernorm", layers.size)

    def forward(weights: Weights, pixel_values: jax.Array, *, key: jax.Array | None = None) -> Output:
        embedded = patches(weights, "embeddings.patch_embedding", pixel_values, (image, image), config.where)
        first = jnp.broadcast_to(weights["embeddings.class_embedding"], (embedded.shape[0], 1, layers.size))
        x = jnp.concatenate([first, embedded], 1) + weights["embeddings.position_embedding.weight"]
        x = layers.run(weights, layer_norm(weights, "pre_layrnorm", x, layers.eps), None, key)
        return Output(x, layer_norm(weights, "post_layernorm", x[:, 0], layers.eps))

    return Encoder(
        name=config.name,
        weights=shapes,
        inputs=("pixel_values",),
        prefixes=("vision_model.",),
        forward=forward,
    )


def clip_text(config: Config) -> Encoder:
    """Return CLIP's text encoder: ``forward(weights, input_ids, attention_mask)``, both ``[B, T]``.

    Attention is causal. The pooled output is the hidden state of the first token with the id ``eos_token_id``, or, if
    that is 2 as in early configurations, of the largest id. The projection into the space of text and images is not
    part of the encoder.

    References:
        A. Radford et al.: Learning transferable visual models from natural language supervision. ICML 2021.
    """
    config.require(is_causal=True)
    layers = _layers(config, 512, 2048, 8)
    vocabulary, limit = config.size("vocab_size", 49408), config.size("max_position_embeddings", 77)
    end = config.token("eos_token_id", 49407)
    if end is None:
        raise ValueError(f"{config.where}: eos_token_id must be an integer, got null")
    shapes: Shapes = {
        "embeddings.token_embedding.weight": (vocabulary, layers.size),
        "embeddings.position_embedding.weight": (limit, layers.size),
    }
    shapes |= layers.shapes() | norm_shapes("final_layer_norm", layers.size)

    def forward(
        weights: Weights,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        key: jax.Array | None = None,
    ) -> Output:
        length = input_ids.shape[1]
        if length > limit:
            raise ValueError(
                f"{config.where}: {length} tokens are more than max_position_embeddings {limit}; truncate the inputs"
            )
        mask = make_mask(attention_mask, length, causal=True, where=config.where)
        x = embed(weights, "embeddings.token_embedding", input_ids)
        x = layers.run(weights, x + weights["embeddings.position_embedding.weight"][:length], mask, key)
        x = layer_norm(weights, "final_layer_norm", x, layers.eps)
        last = jnp.argmax(input_ids if end == _EARLY_END else input_ids == end, -1)
        return Output(x, jnp.take_along_axis(x, last[:, None, None], 1)[:, 0])

    return Encoder(
        name=config.name,
        weights=shapes,
        inputs=("input_ids", "attention_mask"),
        max_length=limit,
        prefixes=("text_model.",),
        forward=forward,
    )
