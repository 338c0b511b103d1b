"""The text encoder of CLIP, over the state dict of ``transformers.CLIPTextModel``.

B batch, T tokens.
"""

from __future__ import annotations

from typing import Final

import jax
import jax.numpy as jnp

from recis_hybrid.bridge.pretrained.encoder import Config, Encoder, Output, Shapes, Weights
from recis_hybrid.bridge.pretrained.layers import attention_mask as make_mask, embed, layer_norm, norm_shapes
from recis_hybrid.bridge.pretrained.pre_norm import clip_layers

_EARLY_END: Final = 2
"""The ``eos_token_id`` of early configurations, whose vocabulary has another one: its largest id."""


def clip_text(config: Config) -> Encoder:
    """Return CLIP's text encoder: ``forward(weights, input_ids, attention_mask)``, both ``[B, T]``.

    Attention is causal. The pooled output is the hidden state of the first token with the id ``eos_token_id``, or, if
    that is 2 as in early configurations, of the largest id. The projection into the space of text and images is not
    part of the encoder.

    References:
        A. Radford et al.: Learning transferable visual models from natural language supervision. ICML 2021.
    """
    config.require(is_causal=True)
    layers = clip_layers(config, 512, 2048, 8)
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
