"""ViT and the vision encoder of CLIP, over the state dicts of ``transformers.ViTModel`` and ``CLIPVisionModel``.

B batch, C channels, Y and X height and width in pixels, T tokens: one for the class and one for each patch.
"""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp

from recis_hybrid.bridge.pretrained.encoder import Config, Encoder, Output, Shapes, Weights
from recis_hybrid.bridge.pretrained.layers import (
    ACTIVATIONS,
    dropout,
    layer_norm,
    linear,
    linear_shapes,
    norm_shapes,
    patch_shapes,
    patches,
    split,
)
from recis_hybrid.bridge.pretrained.pre_norm import PreNorm, clip_layers

_VIT_RENAMES: Final = (
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
    layers = _vit_layers(config)
    channels = config.size("num_channels", 3)
    image, patch = config.sides("image_size", 224), config.sides("patch_size", 16)
    pooler_act = config.choice("pooler_act", ACTIVATIONS, "tanh")
    embeddings = "embeddings.patch_embeddings.projection"
    shapes: Shapes = {
        "embeddings.cls_token": (1, 1, layers.size),
        "embeddings.position_embeddings": (1, 1 + (image[0] // patch[0]) * (image[1] // patch[1]), layers.size),
    }
    shapes |= patch_shapes(embeddings, layers.size, channels, patch)
    shapes |= layers.shapes() | norm_shapes("layernorm", layers.size)

    def forward(weights: Weights, pixel_values: jax.Array, *, key: jax.Array | None = None) -> Output:
        embedding_key, layers_key = split(key, 2)
        embedded = patches(weights, embeddings, pixel_values, image, config.where)
        x = _with_class(weights["embeddings.cls_token"], embedded) + weights["embeddings.position_embeddings"]
        x = layers.run(weights, dropout(x, layers.rate, embedding_key), None, layers_key)
        x = layer_norm(weights, "layernorm", x, layers.eps)
        is_pooled = "pooler.dense.weight" in weights
        return Output(x, pooler_act(linear(weights, "pooler.dense", x[:, 0])) if is_pooled else None)

    return Encoder(
        name=config.name,
        weights=shapes,
        optional=linear_shapes("pooler.dense", config.size("pooler_output_size", layers.size), layers.size),
        inputs=("pixel_values",),
        prefixes=("vit.",),
        renames=_VIT_RENAMES,
        forward=forward,
    )


def _vit_layers(config: Config) -> PreNorm:
    """Return the layers of ViT."""
    size = config.size("hidden_size", 768)
    heads = config.size("num_attention_heads", 12)
    if config.fields.get("head_dim") is None:
        config.heads(size, 12)
    return PreNorm(
        size=size,
        inner=heads * config.size("head_dim", size // heads),
        hidden=config.size("intermediate_size", 3072),
        count=config.size("num_hidden_layers", 12),
        heads=heads,
        eps=config.number("layer_norm_eps", 1e-12),
        act=config.choice("hidden_act", ACTIVATIONS, "gelu"),
        rate=config.rate("hidden_dropout_prob", 0.0),
        attention_rate=config.rate("attention_probs_dropout_prob", 0.0),
        qkv_bias=config.flag("qkv_bias", True),
        stack="layers",
        attention="attention",
        output="o_proj",
        norms=("layernorm_before", "layernorm_after"),
    )


def clip_vision(config: Config) -> Encoder:
    """Return CLIP's vision encoder: ``forward(weights, pixel_values)`` with pixels ``[B, C, Y, X]``, float.

    The hidden states come before the last normalization, the pooled output, that of the class token, after it. The
    projection into the space of text and images is not part of the encoder.

    References:
        A. Radford et al.: Learning transferable visual models from natural language supervision. ICML 2021.
    """
    layers = clip_layers(config, 768, 3072, 12)
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
        x = _with_class(weights["embeddings.class_embedding"], embedded)
        x += weights["embeddings.position_embedding.weight"]
        x = layers.run(weights, layer_norm(weights, "pre_layrnorm", x, layers.eps), None, key)
        return Output(x, layer_norm(weights, "post_layernorm", x[:, 0], layers.eps))

    return Encoder(
        name=config.name,
        weights=shapes,
        inputs=("pixel_values",),
        prefixes=("vision_model.",),
        forward=forward,
    )


def _with_class(token: jax.Array, embedded: jax.Array) -> jax.Array:
    """Put the embedding of the class token before those of the patches."""
    first = jnp.broadcast_to(token, (embedded.shape[0], 1, embedded.shape[2]))
    return jnp.concatenate([first, embedded], 1)
