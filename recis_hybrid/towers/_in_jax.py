"""Pretrained models in JAX, as JaxTowers. :mod:`recis_hybrid.towers._in_torch` has the same functions.

The bridge, and with it JAX, is imported by the functions that build towers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.towers._in_torch import adapted_name, align, freeze_pooler, no_output
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
    tower: Any = _build(_Function(files.config, pooled), files.read(names, dtype), classes)
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
    return _build(_Function(config, pooled), {name: named[own] for name, own in names.items()}, classes)


def run(model: nn.Module, inputs: Mapping[str, Tensor], pooled: bool) -> Tensor:
    """Compute the model.

    Args:
        model: The result of :func:`load` or :func:`share`.
        inputs: The inputs by name.
        pooled: Ignored; the tower was built for one output.

    Returns:
        The hidden states after the last layer, ``[B, T, D]``, or the pooled output, ``[B, P]``. Under torch's autocast,
        products are in its dtype, and the hidden states in that of the parameters.
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
    # JAX does not see torch's autocast. A keyword is static, so each dtype has a program of its own.
    device = next(iter(given.values())).device.type
    if not torch.is_autocast_enabled(device):
        return model(given)  # type: ignore[no-any-return]
    return model(given, dtype=str(torch.get_autocast_dtype(device)).removeprefix("torch."))  # type: ignore[no-any-return]


def recompute(model: nn.Module) -> nn.Module:
    """Return a tower of the same parameters that recomputes layers in backward instead of saving activations."""
    own: Any = model
    tower: Any = _build(own.function, dict(own.named_parameters()), own.classes, recomputes=True)
    if (files := getattr(own, "weight_files", None)) is not None:
        tower.weight_files = files
    return tower  # type: ignore[no-any-return]


def adapt(
    model: nn.Module,
    scaling: Mapping[str, float],
    ranks: Mapping[str, int],
    dropout: float,
    parameters: Mapping[str, nn.Parameter],
) -> nn.Module:
    """Return a tower with low-rank adapters of linear layers, over the same parameters.

    Args:
        model: The result of :func:`load` or :func:`share`.
        scaling: The factor of each adapter's output, by the path of the layer.
        ranks: Ignored; the parameters have their ranks.
        dropout: Dropout rate of the adapters' inputs.
        parameters: The adapters' parameters by the names of peft.
    """
    own: Any = model
    params = {adapted_name(name, scaling): parameter for name, parameter in own.named_parameters()}
    function = own.function.adapted(scaling, dropout)
    return _build(function, params | dict(parameters), own.classes, recomputes=own.recomputes)


def describe(model: nn.Module) -> tuple[str, int | None]:
    """Return the name of the model's first input, and the largest number of tokens per row, None for no limit."""
    function: Any = model.function
    return function.inputs[0], function.longest


class _Function:
    """The function of a tower: one output of an encoder, for a dictionary of its inputs.

    Args:
        config: The configuration, from which a pickled copy builds the encoder again.
        pooled: Whether to return the pooled output instead of the hidden states.
        scaling: The factor of the output of each low-rank adapter, by the path of the layer.
        dropout: Dropout rate of the adapters' inputs.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        pooled: bool,
        scaling: Mapping[str, float] | None = None,
        dropout: float = 0.0,
    ) -> None:
        from recis_hybrid.bridge.pretrained import encoder

        found = encoder(config)
        self._config, self._pooled, self._forward = config, pooled, found.forward
        self._scaling, self._dropout = dict(scaling or {}), dropout
        self.__name__ = found.name
        self.inputs, self.longest, self.threshold = found.inputs, found.max_length, found.threshold

    def adapted(self, scaling: Mapping[str, float], dropout: float) -> _Function:
        """Return the function with adapters of some layers."""
        return _Function(self._config, self._pooled, scaling, dropout)

    def __call__(self, weights: Any, inputs: Any, *, key: Any = None, dtype: str | None = None) -> Any:
        if self._scaling:
            from recis_hybrid.bridge.pretrained import with_adapters

            weights = with_adapters(weights, self._scaling, self._dropout, key)
        if dtype is not None:
            from recis_hybrid.bridge.pretrained import COMPUTE

            weights = {**weights, COMPUTE: dtype}
        output = self._forward(weights, **inputs, key=key)
        if self._pooled and output.pooler_output is None:
            raise no_output(self.__name__, pooled=True)
        return output.pooler_output if self._pooled else output.last_hidden_state

    def __reduce__(self) -> tuple[Any, ...]:
        return _Function, (self._config, self._pooled, self._scaling, self._dropout)


def _build(
    function: _Function, params: Mapping[str, Tensor], classes: Classes | None, *, recomputes: bool = False
) -> nn.Module:
    """Return the tower of a function and its parameters, which it does not copy.

    Args:
        function: The function.
        params: Its parameters.
        classes: The sizes to pad inputs to, None for the default.
        recomputes: Whether to save only the hidden states between layers for backward.
    """
    from recis_hybrid.bridge import JaxTower
    from recis_hybrid.bridge.pretrained import ONLY_LAYERS

    dims = ("batch", "length") if function.inputs[0] == "input_ids" else ("batch",)
    sizes, remat = _sizes(function, dims, classes or {}), ONLY_LAYERS if recomputes else None
    tower: Any = JaxTower(function, dict(params), copy=False, dims=[dims], classes=sizes, remat=remat)
    tower.function, tower.classes, tower.recomputes = function, classes, recomputes
    return tower  # type: ignore[no-any-return]


def _sizes(function: _Function, dims: Sequence[str], classes: Classes) -> dict[str, Sequence[int] | None]:
    """Return the sizes to pad each dimension to, None for powers of two."""
    sizes: dict[str, Sequence[int] | None]
    sizes = {name: _lengths(function.longest) if name == "length" else None for name in dims}
    sizes |= {name: sizes.get(name) if given is None else given for name, given in classes.items()}
    lengths, threshold = sizes.get("length"), function.threshold
    if lengths and threshold is not None and threshold < max(lengths):
        sizes["length"] = sorted({*lengths, threshold})  # texts must not be padded across the threshold
    return sizes


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
