"""Freezing of pretrained models, by name and by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
_BEFORE_LAYERS = re.compile(r"embed|pre_layr?norm")


def freeze(module: nn.Module, which: bool | int | str | Sequence[str]) -> list[str]:
    """Exclude parameters from training.

    Frozen parameters do not require gradients, so neither torch nor JAX computes them, nor those of activations below
    the lowest trainable parameter. Modules that decide by their parameters whether to apply dropout are updated.

    Args:
        module: The model.
        which: True for all parameters; False for none; a number n for the embeddings and the first n layers; or
            patterns such as "encoder.layer.0.*", with ``*`` and ``?``, that match whole names of parameters.

    Returns:
        The names of the parameters that were matched.

    Raises:
        ValueError: If a pattern matches nothing, or the model has fewer layers than the number.

    Example:
        >>> freeze(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "*.weight")
        ['0.weight']
    """
    if which is False:
        return []
    names = [name for name, _ in module.named_parameters()]
    if which is True:
        chosen = names
    elif isinstance(which, int):
        chosen = _of_first_layers(names, which)
    else:
        chosen = _matching(names, [which] if isinstance(which, str) else list(which))
    parameters = dict(module.named_parameters())
    for name in chosen:
        parameters[name].requires_grad_(False)
    module.train(module.training)
    return chosen


def layer_of(name: str) -> int | None:
    """Return the layer number in a parameter's name, or None.

    Example:
        >>> layer_of("encoder.layer.3.output.dense.bias"), layer_of("embeddings.LayerNorm.bias")
        (3, None)
    """
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def _of_first_layers(names: Sequence[str], count: int) -> list[str]:
    """Return the parameters of the embeddings and of the first layers."""
    layers = {layer for layer in map(layer_of, names) if layer is not None}
    if not 0 <= count <= len(layers):
        raise ValueError(
            f"freeze: which must be from 0 to {len(layers)}, the number of layers of the model, got {count}"
        )
    chosen = []
    for name in names:
        layer = layer_of(name)
        if _BEFORE_LAYERS.search(name) if layer is None else layer < count:
            chosen.append(name)
    return chosen


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match any pattern."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"freeze: the pattern {pattern!r} matches no parameter; the first names are "
                f"{', '.join(map(repr, names[:3]))}, and '*' matches any text"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
