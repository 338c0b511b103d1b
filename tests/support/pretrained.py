"""Comparison of JAX encoders with small random models of transformers."""

from __future__ import annotations

import warnings
from typing import Any

import hypothesis
import torch
from hypothesis import Phase
from torch import Tensor, nn

from tests.support.near import assert_near, magnitude

RELATIVE = 1e-4
"""Largest difference of hidden states and gradients in float32, relative to the largest in a row."""
ALLOWED = RELATIVE / torch.finfo(torch.float32).eps
"""The same in roundings, for ``assert_near``."""


class Regression(nn.Module):
    """A linear layer over the embeddings ``[B, 16]`` of a tower, for batches with token ids "ids"."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.head = tower, nn.Linear(16, 1)

    def forward(self, batch: Any) -> Tensor:
        """Return ``[B]``, float32."""
        return self.head(self.tower(batch["ids"]).float())[:, 0]  # type: ignore[no-any-return]


def few(examples: int) -> hypothesis.settings:
    """Return settings for a few examples, each of which compiles a program, so that shrinking would take minutes."""
    return hypothesis.settings(max_examples=examples, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def model_of(config: Any, seed: int = 0) -> Any:
    """Return a model of transformers in eval mode, with random weights of a size that no layer hides.

    Args:
        config: A configuration of transformers, whose attention is set to the plain implementation.
        seed: The seed of the weights.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about optional packages
        from transformers import AutoModel

        config._attn_implementation = "eager"
        model = AutoModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name.lower() and parameter.dim() == 1 else 0.0, 0.3, generator=generator)
    return model


def weights_of(model: Any) -> dict[str, Any]:
    """Return the parameters of a model as numpy arrays, after matching them with its encoder."""
    from recis_hybrid.bridge.pretrained import encoder

    own = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    names = encoder(model.config.to_dict()).match({name: array.shape for name, array in own.items()})
    assert names == {name: name for name in names}, "transformers 5 has other names"
    assert names.keys() == own.keys()
    return own


def compile_fast(lowered: Any) -> Any:
    """Return a compiled program of small arrays, in a fifth of the usual time."""
    from jax.errors import JaxRuntimeError

    options = {"xla_backend_optimization_level": 0}
    try:
        return lowered.compile(options | {"xla_cpu_use_fusion_emitters": False})
    except JaxRuntimeError as error:
        if "xla_cpu_use_fusion_emitters" not in str(error):
            raise
        return lowered.compile(options)  # a version of XLA without the older generator of code


def assert_agrees(model: Any, inputs: dict[str, Tensor], **options: Any) -> None:
    """Assert that the encoder of a model has the outputs and the gradients of all parameters that the model has.

    Args:
        model: A model of transformers.
        inputs: Inputs of its forward, by name.
        **options: Further arguments of ``encoder``.
    """
    import jax

    from recis_hybrid.bridge.pretrained import encoder

    result = model(**inputs)
    outputs = [each for each in (result.last_hidden_state, result.get("pooler_output")) if each is not None]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(each.shape, generator=generator) for each in outputs]
    named = dict(model.named_parameters())
    found = torch.autograd.grad(outputs, list(named.values()), cotangents, allow_unused=True)
    expected = {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(named.items(), found, strict=True)
    }
    forward = encoder(model.config.to_dict(), **options).forward

    def compute(weights: Any, arrays: Any, cotangents: Any) -> Any:
        outputs, pullback = jax.vjp(lambda weights: jax.tree.leaves(forward(weights, **arrays)), weights)
        return outputs, pullback(cotangents)[0]

    arrays = {name: each.numpy() if each.is_floating_point() else each.int().numpy() for name, each in inputs.items()}
    arguments = weights_of(model), arrays, [each.numpy() for each in cotangents]
    got, gradients = compile_fast(jax.jit(compute).lower(*arguments))(*arguments)
    assert_near(list(got), outputs, ALLOWED, where="outputs")
    # The gradients of queries and keys are sums of large terms that cancel, to zero for the bias of keys.
    least = max(float(gradient.square().mean().sqrt()) for gradient in expected.values()) / 10
    for name, wanted in expected.items():
        terms = magnitude(wanted).clamp_min(least)
        assert_near(gradients[name], wanted, ALLOWED, terms=terms, where=f"gradient of {name}")
