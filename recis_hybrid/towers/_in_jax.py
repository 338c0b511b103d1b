"""Pretrained models in JAX, as JaxTowers. :mod:`recis_hybrid.towers._in_torch` has the same functions.

The bridge, and with it JAX, is imported by the functions that build towers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.towers._in_torch import align, freeze_pooler, no_output
from recis_hybrid.towers.files import PretrainedFiles, ReadWeights

Classes = Mapping[str, Sequence[int] | None]
"""Sizes to which inputs are padded, by dimension, "batch" or "length"; None for powers of two of at least 8."""
_SMALLEST_CLASS = 8


def load(files: PretrainedFiles, dtype: torch.dtype, pooled: bool, classes: Classes | None) -> nn.Module:
    """Build the tower, and read its weights.

    Args:
        files: The files.
        dtype: Dtype of the parameters.
        pooled: Whether the output is the model's own pooled one.
        classes: The sizes to pad inputs to, None for the default.

    Raises:
        ImportError: If JAX is not installed.
        ValueError: If the weights do not fit the configuration, or the model is not implemented in JAX.
    """
    from recis_hybrid.bridge.pretrained import encoder

    names = encoder(files.config).match(files.shapes)
    tower: Any = _build(files.config, files.read(names, dtype), pooled, classes)
    tower.weight_files = ReadWeights(files, names, dtype)
    if not pooled:
        freeze_pooler(tower)
    return tower  # type: ignore[no-any-return]


def share(model: nn.Module, config: Mapping[str, Any], pooled: bool, classes: Classes | None) -> nn.Module:
    """Build the tower over the parameters of a module of transformers, which both then train.

    Args:
        model: The module, or a larger one that contains it.
        config: Its configuration.
        pooled: Whether the output is the model's own pooled one.
        classes: The sizes to pad inputs to, None for the default.

    Raises:
        ImportError: If JAX is not installed.
        ValueError: If the parameters do not fit the configuration, or the model is not implemented in JAX.
    """
    from recis_hybrid.bridge.pretrained import encoder

    named = dict(model.named_parameters())
    names = encoder(config).match({name: tuple(parameter.shape) for name, parameter in named.items()})
    align(named[name] for name in names.values())
    return _build(config, {name: named[own] for name, own in names.items()}, pooled, classes)


def run(model: nn.Module, inputs: Mapping[str, Tensor], pooled: bool) -> Tensor:
    """Compute the model.

    Args:
        model: The result of :func:`load` or :func:`share`.
        inputs: The inputs by name.
        pooled: Ignored; the tower was built for one output.

    Returns:
        The hidden states after the last layer, ``[B, T, D]``, or the pooled output, ``[B, P]``.
    """
    given = {name: _narrowed(tensor) for name, tensor in inputs.items()}
    if "input_ids" in given and "attention_mask" not in given:
        # Padded rows and tokens need one.
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    function: Any = model.function
    if unknown := sorted(given.keys() - set(function.inputs)):
        raise TypeError(
            f"hf_tower: the model takes {', '.join(function.inputs)}, but not {', '.join(unknown)}; omit it"
        )
    return model(given)  # type: ignore[no-any-return]


def describe(model: nn.Module) -> tuple[str, int | None]:
    """Return the name of the model's first input, and the largest number of tokens per row, None for no limit."""
    function: Any = model.function
    return function.inputs[0], function.longest


class _Function:
    """The function of a tower: one output of an encoder, for a dictionary of its inputs.

    Args:
        config: The configuration, from which a pickled copy builds the encoder again.
        pooled: Whether to return the pooled output instead of the hidden states.
    """

    def __init__(self, config: Mapping[str, Any], pooled: bool) -> None:
        from recis_hybrid.bridge.pretrained import encoder

        found = encoder(config)
        self._config, self._pooled, self._forward = config, pooled, found.forward
        self.__name__ = found.name
        self.inputs, self.longest = found.inputs, found.max_length

    def __call__(self, weights: Any, inputs: Any, *, key: Any = None) -> Any:
        output = self._forward(weights, **inputs, key=key)
        if self._pooled and output.pooler_output is None:
            raise no_output(self.__name__, pooled=True)
        return output.pooler_output if self._pooled else output.last_hidden_state

    def __reduce__(self) -> tuple[Any, ...]:
        return _Function, (self._config, self._pooled)


def _build(config: Mapping[str, Any], params: dict[str, Tensor], pooled: bool, classes: Classes | None) -> nn.Module:
    """Return the tower of parameters, which it does not copy."""
    from recis_hybrid.bridge import JaxTower

    function = _Function(config, pooled)
    sizes: dict[str, Sequence[int] | None] = {"batch": None}
    if function.inputs[0] == "input_ids":
        sizes["length"] = _lengths(function.longest)
    tower: Any = JaxTower(function, params, copy=False, dims=[tuple(sizes)], classes=sizes | dict(classes or {}))
    tower.function = function
    return tower  # type: ignore[no-any-return]


def _lengths(longest: int | None) -> list[int] | None:
    """Return powers of two up to the largest length, and that length, beyond which there are no positions."""
    if longest is None:
        return None
    powers = [
        _SMALLEST_CLASS << number for number in range(longest.bit_length()) if _SMALLEST_CLASS << number < longest
    ]
    return [*powers, longest]


def _narrowed(tensor: Tensor) -> Tensor:
    """Return integers as int32, because JAX has no int64 by default. Token ids fit."""
    return tensor if tensor.is_floating_point() else tensor.to(torch.int32)
