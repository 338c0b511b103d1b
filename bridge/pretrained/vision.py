"""ViT, over the state dict of ``transformers.ViTModel``.

B batch, C channels, Y and X height and width in pixels, H hidden size, T tokens: the class token and the patches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from recis_hybrid.bridge.pretrained.encoder import Config, Encoder, Output, Shapes, Weights
from recis_hybrid.bridge.pretrained.layers import (
    ACTIVATIONS,
    after_layer,
    attend,
    dropout,
    layer_norm,
    linear,
    linear_shapes,
    norm_shapes,
    patch_shapes,
    patches,
    split,
    split_heads,
)

_VIT_RENAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
"""Names in files, which are those of transformers 4, and the names of transformers 5."""


def vit(config: Config) -> Encoder:
    """Return a Vision Transformer: ``forward(weights, pixel_values)`` with pixels ``[B, C, Y, X]``, float.

    References:
        A. Dosovitskiy et al.: An image is worth 16x16 words: Transformers for image recognition at scale. ICLR 2021.
    """
    size = config.size("hidden_size", 768)
    heads = config.size("num_attention_heads", 12)
    if "head_dim" not in config.fields:
        config.heads(size, 12)
    inner = heads * config.size("head_dim", size // heads)
    hidden = config.size("intermediate_size", 3072)
    count = config.size("num_hidden_layers", 12)
    channels = config.size("num_channels", 3)
    image, patch = config.sides("image_size", 224), config.sides("patch_size", 16)
    pooled = config.size("pooler_output_size", size)
    eps = config.number("layer_norm_eps", 1e-12)
    rate, attention_rate = config.rate("hidden_dropout_prob", 0.0), config.rate("attention_probs_dropout_prob", 0.0)
    act = config.choice("hidden_act", ACTIVATIONS, "gelu")
    pooler_act = config.choice("pooler_act", ACTIVATIONS, "tanh")
    bias = config.flag("qkv_bias", True)

    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, size),
        "embeddings.position_embeddings": (1, 1 + (image[0] // patch[0]) * (image[1] // patch[1]), size),
    }
    shapes |= patch_shapes("embeddings.patch_embeddings.projection", size, channels, patch)
    for layer in (f"layers.{number}" for number in range(count)):
        for part in ("q_proj", "k_proj", "v_proj"):
            shapes |= linear_shapes(f"{layer}.attention.{part}", inner, size, bias=bias)
        shapes |= linear_shapes(f"{layer}.attention.o_proj", size, inner)
        shapes |= linear_shapes(f"{layer}.mlp.fc1", hidden, size) | linear_shapes(f"{layer}.mlp.fc2", size, hidden)
        shapes |= norm_shapes(f"{layer}.layernorm_before", size) | norm_shapes(f"{layer}.layernorm_after", size)
    shapes |= norm_shapes("layernorm", size)

    def block(weights: Weights, layer: str, x: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = split(key, 3)
        normal = layer_norm(weights, f"{layer}.layernorm_before", x, eps)
        q, k, v = (
            split_heads(linear(weights, f"{layer}.attention.{part}", normal), heads)
            for part in ("q_proj", "k_proj", "v_proj")
        )
        attended = attend(q, k, v, None, rate=attention_rate, dropout_key=keys[0])
        x += dropout(linear(weights, f"{layer}.attention.o_proj", attended), rate, keys[1])
        normal = layer_norm(weights, f"{layer}.layernorm_after", x, eps)
        inside = act(linear(weights, f"{layer}.mlp.fc1", normal))
        return x + dropout(linear(weights, f"{layer}.mlp.fc2", inside), rate, keys[2])

    def forward(weights: Weights, pixel_values: jax.Array, *, key: jax.Array | None = None) -> Output:
        keys = split(key, count + 1)
        embedded = patches(weights, "embeddings.patch_embeddings.projection", pixel_values, image, config.where)
        first = jnp.broadcast_to(weights["embeddings.cls_token"], (embedded.shape[0], 1, size))
        x = jnp.concatenate([first, embedded], 1) + weights["embeddings.position_embeddings"]
        x = dropout(x, rate, keys[0])
        for number in range(count):
            x = after_layer(block(weights, f"layers.{number}", x, keys[number + 1]))
        x = layer_norm(weights, "layernorm", x, eps)
        is_pooled = "pooler.dense.weight" in weights
        return Output(x, pooler_act(linear(weights, "pooler.dense", x[:, 0])) if is_pooled else None)

    return Encoder(
        name=config.name,
        weights=shapes,
        optional=linear_shapes("pooler.dense", pooled, size),
        inputs=("pixel_values",),
        prefixes=("vit.",),
        renames=_VIT_RENAMES,
        forward=forward,
    )
