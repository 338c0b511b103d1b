"""Layers of encoders, compared with torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.support.near import assert_near
from tests.support.pretrained import model_of

pytestmark = pytest.mark.jax
jax = pytest.importorskip("jax")
transformers = pytest.importorskip("transformers")
from recis_hybrid.bridge import to_jax, to_torch  # noqa: E402
from recis_hybrid.bridge.pretrained import encoder, layers  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def jaxed(*tensors: torch.Tensor) -> list[Any]:
    return [to_jax(tensor, copy=True) for tensor in tensors]


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_are_those_of_transformers(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-9, 9, 64)
    (array,) = jaxed(x)
    assert_near(layers.ACTIVATIONS[name](array), ACT2FN[name](x), terms=x.abs().clamp_min(1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype: torch.dtype) -> None:
    # A mean much larger than the deviation cancels.
    x, weight, bias = random(4, 7, dtype=dtype) + 3, random(7, dtype=dtype), random(7, dtype=dtype, seed=1)
    array, *own = jaxed(x, weight, bias)
    got = layers.layer_norm({"n.weight": own[0], "n.bias": own[1]}, "n", array, 1e-5)
    expected = functional.layer_norm(x.float(), (7,), weight.float(), bias.float(), 1e-5)
    assert_near(to_torch(got), expected.to(dtype), 1 if dtype == torch.bfloat16 else 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = random(4, 7, dtype=dtype), random(7, dtype=dtype)
    norm = LlamaRMSNorm(7, 1e-5)
    norm.weight.data = weight
    array, own = jaxed(x, weight)
    got = layers.rms_norm({"n.weight": own}, "n", array, 1e-5)
    assert_near(to_torch(got), norm(x), 1 if dtype == torch.bfloat16 else 64)


def test_ids_outside_of_an_embedding_are_nan() -> None:
    table = jax.numpy.ones((3, 2))
    got = np.asarray(layers.embed({"e.weight": table}, "e", jax.numpy.array([[0, 2, 3], [-1, 1, 2**31 - 1]])))
    assert np.isnan(got).all(-1).tolist() == [[False, False, True], [True, False, True]]


@pytest.mark.parametrize("padding_id", [1, -1])
def test_the_row_of_padding_has_no_gradient(padding_id: int) -> None:
    ids = torch.tensor([0, 1, 2, 1])
    table = random(3, 2).requires_grad_()
    functional.embedding(ids, table, padding_id).sum().backward()
    (array,) = jaxed(table.detach())
    got = jax.grad(lambda table: layers.embed({"e.weight": table}, "e", ids.int().numpy(), padding_id).sum())(array)
    assert_near(got, table.grad)


def test_padding_without_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="e: pad_token_id must be from -3 to 2, because there are 3 rows, got 3"):
        layers.embed({"e.weight": jax.numpy.ones((3, 2))}, "e", jax.numpy.zeros(1, int), 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype: torch.dtype) -> None:
    query, key, value = (random(2, heads, 5, 3, dtype=dtype, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    tokens = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    mask = torch.ones(5, 5).tril().bool() & tokens.bool()[:, None, None]
    # torch gives zeros where a query has no key; transformers, and so attend, the mean of all values.
    expected = functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    mean = value.mean(2, keepdim=True).repeat_interleave(2, 1)
    expected = torch.where(mask.any(-1, keepdim=True), expected, mean)
    arrays = jaxed(*(each.transpose(1, 2).contiguous() for each in (query, key, value)))
    ours = layers.attention_mask(to_jax(tokens.int()), 5, causal=True, where="here")
    got = layers.attend(*arrays, ours)
    assert_near(to_torch(got), expected.transpose(1, 2).flatten(2), 4 if dtype == torch.bfloat16 else 64)


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 1, 5), (5,)])
def test_masks_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"here: attention_mask must have shape \[batch, 5\], got \["):
        layers.attention_mask(jax.numpy.ones(shape), 5, causal=False, where="here")


def test_without_padding_only_causal_attention_has_a_mask() -> None:
    assert layers.attention_mask(None, 5, causal=False, where="here") is None
    (causal,) = np.asarray(layers.attention_mask(None, 5, causal=True, where="here"))
    assert (causal == np.tril(np.ones((5, 5), bool))).all()


def test_a_bfloat16_encoder_is_as_exact_as_transformers() -> None:
    config = transformers.Qwen3Config(
        vocab_size=11,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = model_of(config).bfloat16()
    ids = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))
    theirs = model(ids).last_hidden_state.detach()
    weights = {name: to_jax(parameter.detach(), copy=True) for name, parameter in model.named_parameters()}
    ours = to_torch(jax.jit(encoder(config.to_dict()).forward)(weights, ids.int().numpy()).last_hidden_state)
    assert ours.dtype == torch.bfloat16
    exact = model.float()(ids).last_hidden_state.detach()

    def error(got: torch.Tensor) -> float:
        return float((got.float() - exact).square().mean().sqrt())

    assert error(ours) < 1.5 * error(theirs)
