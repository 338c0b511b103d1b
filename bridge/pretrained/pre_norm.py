"""The layers that ViT and both encoders of CLIP have: attention and a feed-forward network, each after a normalization.

B batch, T tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax

from recis_hybrid.bridge.pretrained.encoder import Config, Shapes, Weights
from recis_hybrid.bridge.pretrained.layers import (
    ACTIVATIONS,
    Activation,
    after_layer,
    attend,
    dropout,
    layer_norm,
    linear,
    linear_shapes,
    norm_shapes,
    split,
    split_heads,
)


@dataclass(frozen=True, kw_only=True)
class PreNorm:
    """A stack of layers of the same shape."""

    size: int
    """H."""
    inner: int
    """The size of all attention heads together."""
    hidden: int
    """The size of the feed-forward network."""
    count: int
    """The number of layers."""
    heads: int
    eps: float
    act: Activation
    rate: float
    """Dropout rate of the output of attention and of the feed-forward network."""
    attention_rate: float
    """Dropout rate of the attention probabilities."""
    qkv_bias: bool = True
    stack: str
    """Name of the stack; the following names are relative to a layer."""
    attention: str
    output: str
    """Name of the last projection, relative to the attention."""
    norms: tuple[str, str]
    """Names of the normalizations before the attention and before the feed-forward network."""

    def shapes(self) -> Shapes:
        """Return the parameters."""
        shapes: Shapes = {}
        for layer in (f"{self.stack}.{number}" for number in range(self.count)):
            for part in ("q_proj", "k_proj", "v_proj"):
                shapes |= linear_shapes(f"{layer}.{self.attention}.{part}", self.inner, self.size, bias=self.qkv_bias)
            shapes |= linear_shapes(f"{layer}.{self.attention}.{self.output}", self.size, self.inner)
            shapes |= linear_shapes(f"{layer}.mlp.fc1", self.hidden, self.size)
            shapes |= linear_shapes(f"{layer}.mlp.fc2", self.size, self.hidden)
            for norm in self.norms:
                shapes |= norm_shapes(f"{layer}.{norm}", self.size)
        return shapes

    def run(self, weights: Weights, x: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """Return the hidden states after all layers.

        Args:
            weights: Parameters.
            x: ``[B, T, H]``, the hidden states before the first layer.
            mask: The mask of :func:`attend`.
            key: A PRNG key for dropout, or None.

        Returns:
            ``[B, T, H]``.
        """
        for number, layer_key in enumerate(split(key, self.count)):
            layer = f"{self.stack}.{number}"
            attention_key, output_key, network_key = split(layer_key, 3)
            normal = layer_norm(weights, f"{layer}.{self.norms[0]}", x, self.eps)
            attended = self._attention(weights, f"{layer}.{self.attention}", normal, mask, attention_key)
            x += dropout(attended, self.rate, output_key)
            normal = layer_norm(weights, f"{layer}.{self.norms[1]}", x, self.eps)
            inside = self.act(linear(weights, f"{layer}.mlp.fc1", normal))
            x = after_layer(x + dropout(linear(weights, f"{layer}.mlp.fc2", inside), self.rate, network_key))
        return x

    def _attention(
        self, weights: Weights, name: str, x: jax.Array, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        query, keys, values = (
            split_heads(linear(weights, f"{name}.{part}", x), self.heads) for part in ("q_proj", "k_proj", "v_proj")
        )
        attended = attend(query, keys, values, mask, rate=self.attention_rate, dropout_key=key)
        return linear(weights, f"{name}.{self.output}", attended)


def clip_layers(config: Config, size: int, hidden: int, heads: int) -> PreNorm:
    """Return the layers of an encoder of CLIP, with its defaults of sizes."""
    size = config.size("hidden_size", size)
    return PreNorm(
        size=size,
        inner=size,
        hidden=config.size("intermediate_size", hidden),
        count=config.size("num_hidden_layers", 12),
        heads=config.heads(size, heads),
        eps=config.number("layer_norm_eps", 1e-5),
        act=config.choice("hidden_act", ACTIVATIONS, "quick_gelu"),
        rate=0.0,
        attention_rate=config.rate("attention_dropout", 0.0),
        stack="encoder.layers",
        attention="self_attn",
        output="out_proj",
        norms=("layer_norm1", "layer_norm2"),
    )
