"""Dropout: the places and rates of transformers in train mode, with the same elements dropped in both."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.near import assert_near
from tests.support.pretrained import ALLOWED, compile_fast, model_of, weights_of

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
transformers = pytest.importorskip("transformers")
from recis_hybrid.bridge.pretrained import bert, encoder, layers, pre_norm, vision  # noqa: E402

SIZES = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 5}
RATES = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.5}
CASES = {
    "bert": lambda: transformers.BertConfig(**SIZES, **RATES, vocab_size=9),
    "clip_text": lambda: transformers.CLIPTextConfig(**SIZES, attention_dropout=0.3, vocab_size=9, eos_token_id=8),
    "clip_vision": lambda: transformers.CLIPVisionConfig(**SIZES, attention_dropout=0.3, image_size=4, patch_size=2),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=8, n_heads=2, n_layers=2, hidden_dim=5, vocab_size=9, dropout=0.2, attention_dropout=0.5
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        **SIZES, num_key_value_heads=1, head_dim=4, attention_dropout=0.3, vocab_size=9
    ),
    "roberta": lambda: transformers.RobertaConfig(**SIZES, **RATES, vocab_size=9),
    "vit": lambda: transformers.ViTConfig(**SIZES, **RATES, image_size=4, patch_size=2),
}


class Masks:
    """The factors of the elements in each call of dropout, by the number of the call."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.rates: list[float] = []
        self.keys: list[Any] = []

    def factors(self, shape: tuple[int, ...], rate: float) -> np.ndarray:
        self.rates.append(rate)
        drawn = np.random.default_rng(next(self.numbers)).random(int(np.prod(shape)))
        return ((drawn >= rate) / (1 - rate)).astype(np.float32).reshape(shape)

    def in_torch(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return x * torch.from_numpy(self.factors(tuple(x.shape), p)) if training and p else x

    def in_jax(self, x: Any, rate: float, key: Any) -> Any:
        if key is None or rate == 0:
            return x
        self.keys.append(jax.random.key_data(key))
        return x * self.factors(x.shape, rate)


@pytest.mark.parametrize("name", CASES)
def test_dropout_agrees_with_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(CASES[name]()).train()
    generator = torch.Generator().manual_seed(0)
    is_image = "vision" in name or name == "vit"
    inputs = torch.randn(2, 3, 4, 4, generator=generator) if is_image else torch.tensor([[2, 3, 8], [7, 8, 4]])
    theirs, ours = Masks(), Masks()
    monkeypatch.setattr(torch.nn.functional, "dropout", theirs.in_torch)
    for module in (layers, bert, pre_norm, vision):
        monkeypatch.setattr(module, "dropout", ours.in_jax)
    expected = model(inputs)[0]
    forward = encoder(model.config.to_dict()).forward

    def compute(weights: Any, array: Any, key: Any) -> Any:
        return forward(weights, array, key=key)[0], jax.numpy.stack(ours.keys)

    arguments = weights_of(model), inputs.numpy() if is_image else inputs.int().numpy(), jax.random.key(0)
    got, keys = compile_fast(jax.jit(compute).lower(*arguments))(*arguments)
    assert theirs.rates == ours.rates
    assert len(theirs.rates) >= 2
    assert_near(got, expected, ALLOWED)
    assert len(np.unique(keys, axis=0)) == len(ours.rates), "a key is used twice"


def test_elements_are_dropped_at_the_rate_and_keep_their_mean() -> None:
    x = np.arange(1.0, 40_001.0, dtype=np.float32)
    got = np.asarray(layers.dropout(x, 0.25, jax.random.key(1)))
    kept = got != 0
    # Six deviations of a binomial distribution.
    assert abs(kept.mean() - 0.75) < 6 * (0.25 * 0.75 / x.size) ** 0.5
    assert_near(got[kept], (x / 0.75)[kept])


def test_without_a_key_or_a_rate_nothing_is_dropped() -> None:
    x = jax.numpy.ones(9)
    assert layers.dropout(x, 0.5, None) is x
    assert layers.dropout(x, 0.0, jax.random.key(0)) is x
