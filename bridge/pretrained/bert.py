"""BERT, RoBERTa and DistilBERT, over the state dicts of their ``transformers`` modules.

B batch, T tokens, H hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from recis_hybrid.bridge.pretrained.encoder import Config, Encoder, Output, Shapes, Weights
from recis_hybrid.bridge.pretrained.layers import (
    ACTIVATIONS,
    Activation,
    after_layer,
    attend,
    attention_mask as as_mask,
    dropout,
    embed,
    layer_norm,
    linear,
    linear_shapes,
    norm_shapes,
    split,
    split_heads,
)


class _Names(NamedTuple):
    """Names of the modules of a family, relative to a layer."""

    layers: str
    query: str
    key: str
    value: str
    mixed: str
    mixed_norm: str
    up: str
    down: str
    norm: str


_BERT = _Names(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    mixed="attention.output.dense",
    mixed_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    norm="output.LayerNorm",
)
_DISTILBERT = _Names(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    mixed="attention.out_lin",
    mixed_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    norm="output_layer_norm",
)


class _Settings(NamedTuple):
    """Settings of the forward function."""

    where: str
    """The prefix of error messages."""
    names: _Names
    layers: int
    heads: int
    activation: Activation
    eps: float
    rate: float
    """Dropout rate of the embeddings and of each layer's two outputs."""
    attention_rate: float
    mixed_rate: float
    """Dropout rate of the output of attention."""
    padding_id: int | None
    longest: int
    """The largest number of tokens."""
    counts_positions: bool = False
    """True if positions count the tokens that are not padding, from ``padding_id`` + 1 on."""
    fixed_positions: bool = False
    """True if the embeddings of positions are not trained."""


def bert(config: Config) -> Encoder:
    """Return BERT: ``forward(weights, input_ids, attention_mask=None, token_type_ids=None)``, integers ``[B, T]``.

    References:
        J. Devlin et al.: BERT: Pre-training of deep bidirectional transformers for language understanding. NAACL 2019.
    """
    padding_id = config.token("pad_token_id", 0)
    longest = config.size("max_position_embeddings", 512)
    return _with_token_types(config, 30522, padding_id, longest, counts_positions=False)


def roberta(config: Config) -> Encoder:
    """Return RoBERTa: ``forward(weights, input_ids, attention_mask=None, token_type_ids=None)``, integers ``[B, T]``.

    Positions count the tokens that differ from ``pad_token_id``.

    References:
        Y. Liu et al.: RoBERTa: A robustly optimized BERT pretraining approach. arXiv 1907.11692, 2019.
    """
    return _counting_positions(config, 50265)


def xlm_roberta(config: Config) -> Encoder:
    """Return XLM-RoBERTa, which differs from RoBERTa in its vocabulary.

    References:
        A. Conneau et al.: Unsupervised cross-lingual representation learning at scale. ACL 2020.
    """
    return _counting_positions(config, 30522)


def _counting_positions(config: Config, vocabulary: int) -> Encoder:
    """Return RoBERTa, with a default of ``vocab_size``."""
    padding_id = config.token("pad_token_id", 1)
    positions = config.size("max_position_embeddings", 512)
    if padding_id is None or not 0 <= padding_id < positions - 1:
        raise ValueError(
            f"{config.where}: pad_token_id, from which positions are counted, must be from 0 to {positions - 2}, got "
            f"{padding_id!r}"
        )
    return _with_token_types(config, vocabulary, padding_id, positions - padding_id - 1, counts_positions=True)


def distilbert(config: Config) -> Encoder:
    """Return DistilBERT: ``forward(weights, input_ids, attention_mask=None)``, integers ``[B, T]``.

    References:
        V. Sanh et al.: DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter. arXiv 1910.01108,
        2019.
    """
    width, positions = config.size("dim", 768), config.size("max_position_embeddings", 512)
    settings = _Settings(
        where=config.where,
        names=_DISTILBERT,
        layers=config.size("n_layers", 6),
        heads=config.heads(width, 12, "n_heads"),
        activation=config.choice("activation", ACTIVATIONS, "gelu"),
        eps=1e-12,
        rate=config.rate("dropout", 0.1),
        attention_rate=config.rate("attention_dropout", 0.1),
        mixed_rate=0.0,
        padding_id=config.token("pad_token_id", 0),
        longest=positions,
        fixed_positions=config.flag("sinusoidal_pos_embds", False),
    )
    vocabulary = config.size("vocab_size", 30522)
    inner = config.size("hidden_dim", 4 * 768)
    weights = _embedding_shapes(width, {"word": vocabulary, "position": positions})
    return Encoder(
        name=config.name,
        weights=weights | _layer_shapes(settings, width, inner),
        inputs=("input_ids", "attention_mask"),
        prefixes=("distilbert.",),
        max_length=settings.longest,
        forward=functools.partial(_forward_distilbert, settings),
    )


def _with_token_types(
    config: Config, vocabulary: int, padding_id: int | None, longest: int, counts_positions: bool
) -> Encoder:
    """Return BERT or RoBERTa, which have the same parameters.

    Args:
        config: The configuration.
        vocabulary: The default of ``vocab_size``.
        padding_id: The token whose embedding is not trained.
        longest: The largest number of tokens.
        counts_positions: Whether positions count the tokens that are not padding.
    """
    config.require(position_embedding_type="absolute")
    width = config.size("hidden_size", 768)
    rate = config.rate("hidden_dropout_prob", 0.1)
    settings = _Settings(
        where=config.where,
        names=_BERT,
        layers=config.size("num_hidden_layers", 12),
        heads=config.heads(width, 12),
        activation=config.choice("hidden_act", ACTIVATIONS, "gelu"),
        eps=config.number("layer_norm_eps", 1e-12),
        rate=rate,
        attention_rate=config.rate("attention_probs_dropout_prob", 0.1),
        mixed_rate=rate,
        padding_id=padding_id,
        longest=longest,
        counts_positions=counts_positions,
    )
    weights = _embedding_shapes(
        width,
        {
            "word": config.size("vocab_size", vocabulary),
            "position": config.size("max_position_embeddings", 512),
            "token_type": config.size("type_vocab_size", 2),
        },
    )
    return Encoder(
        name=config.name,
        weights=weights | _layer_shapes(settings, width, config.size("intermediate_size", 3072)),
        optional=linear_shapes("pooler.dense", width, width),
        inputs=("input_ids", "attention_mask", "token_type_ids"),
        prefixes=("roberta.",) if counts_positions else ("bert.",),
        max_length=settings.longest,
        forward=functools.partial(_forward_bert, settings),
    )


def _embedding_shapes(width: int, rows: Mapping[str, int]) -> Shapes:
    """Return the shapes of embeddings, by kind, and of their normalization."""
    shapes: Shapes = {f"embeddings.{kind}_embeddings.weight": (count, width) for kind, count in rows.items()}
    return shapes | norm_shapes("embeddings.LayerNorm", width)


def _layer_shapes(settings: _Settings, width: int, inner: int) -> Shapes:
    """Return the shapes of all layers."""
    names = settings.names
    shapes: Shapes = {}
    for number in range(settings.layers):
        layer = f"{names.layers}.{number}"
        for name in (names.query, names.key, names.value, names.mixed):
            shapes |= linear_shapes(f"{layer}.{name}", width, width)
        shapes |= linear_shapes(f"{layer}.{names.up}", inner, width)
        shapes |= linear_shapes(f"{layer}.{names.down}", width, inner)
        for name in (names.mixed_norm, names.norm):
            shapes |= norm_shapes(f"{layer}.{name}", width)
    return shapes


def _forward_bert(
    settings: _Settings,
    weights: Weights,
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    token_type_ids: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> Output:
    """Compute BERT and RoBERTa; see :func:`bert`."""
    kinds = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
    extra = embed(weights, "embeddings.token_type_embeddings", kinds)
    hidden = _hidden(settings, weights, input_ids, attention_mask, extra, key)
    if "pooler.dense.weight" not in weights:
        return Output(hidden, None)
    return Output(hidden, jnp.tanh(linear(weights, "pooler.dense", hidden[:, 0])))


def _forward_distilbert(
    settings: _Settings,
    weights: Weights,
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> Output:
    """Compute DistilBERT; see :func:`distilbert`."""
    return Output(_hidden(settings, weights, input_ids, attention_mask, None, key), None)


def _hidden(
    settings: _Settings,
    weights: Weights,
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    extra: jax.Array | None,
    key: jax.Array | None,
) -> jax.Array:
    """Return the hidden states after the last layer, ``[B, T, H]``.

    Args:
        settings: The settings.
        weights: The parameters.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, T]``, or None.
        extra: ``[B, T, H]``, to be added to the embeddings, or None.
        key: PRNG key for dropout, or None.

    Raises:
        ValueError: if there are more tokens than positions.
    """
    length = input_ids.shape[-1]
    if length > settings.longest:
        raise ValueError(
            f"{settings.where}: input_ids have {length} tokens per row, but the model has positions for "
            f"{settings.longest}; truncate the texts"
        )
    mask = as_mask(attention_mask, length, causal=False, where=settings.where)
    first, *keys = split(key, 1 + settings.layers)
    x = embed(weights, "embeddings.word_embeddings", input_ids, settings.padding_id)
    if extra is not None:
        x = x + extra
    x = layer_norm(weights, "embeddings.LayerNorm", x + _positions(settings, weights, input_ids), settings.eps)
    x = dropout(x, settings.rate, first)
    for number, layer_key in enumerate(keys):
        x = after_layer(_layer(settings, weights, f"{settings.names.layers}.{number}", x, mask, layer_key))
    return x


def _positions(settings: _Settings, weights: Weights, input_ids: jax.Array) -> jax.Array:
    """Return the embeddings of positions, ``[B, T, H]`` or ``[T, H]``."""
    name, padding_id = "embeddings.position_embeddings", settings.padding_id
    if settings.counts_positions and padding_id is not None:
        is_token = (input_ids != padding_id).astype(input_ids.dtype)
        return embed(weights, name, jnp.cumsum(is_token, 1) * is_token + padding_id, padding_id)
    table = weights[f"{name}.weight"][: input_ids.shape[-1]]
    return jax.lax.stop_gradient(table) if settings.fixed_positions else table


def _layer(
    settings: _Settings, weights: Weights, name: str, x: jax.Array, mask: jax.Array | None, key: jax.Array | None
) -> jax.Array:
    """Return one layer's output, ``[B, T, H]``: attention and a feed-forward network, each added and normalized."""
    names = settings.names
    attention_key, mixed_key, output_key = split(key, 3)
    query, keys, values = (
        split_heads(linear(weights, f"{name}.{each}", x), settings.heads)
        for each in (names.query, names.key, names.value)
    )
    mixed = attend(query, keys, values, mask, rate=settings.attention_rate, dropout_key=attention_key)
    mixed = dropout(linear(weights, f"{name}.{names.mixed}", mixed), settings.mixed_rate, mixed_key)
    x = layer_norm(weights, f"{name}.{names.mixed_norm}", mixed + x, settings.eps)
    inner = settings.activation(linear(weights, f"{name}.{names.up}", x))
    output = dropout(linear(weights, f"{name}.{names.down}", inner), settings.rate, output_key)
    return layer_norm(weights, f"{name}.{names.norm}", output + x, settings.eps)
