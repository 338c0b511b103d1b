"""Freezing and learning rates of pretrained models, by name and by layer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from recis_hybrid.embedding import Anchor
from recis_hybrid.validation import check_number

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
    chosen = select(module, which)
    for parameter in chosen.values():
        parameter.requires_grad_(False)
    if chosen:
        module.train(module.training)
    return list(chosen)


def select(module: nn.Module, which: bool | int | str | Sequence[str]) -> dict[str, nn.Parameter]:
    """Return some parameters of a model by name, such as those that a stage unfreezes.

    Args:
        module: The model.
        which: See :func:`freeze`.

    Returns:
        The parameters, in the order of the model.

    Raises:
        ValueError: If a pattern matches nothing, or the model has fewer layers than the number.

    Example:
        ::

            top = select(model.tower, ["*.layer.10.*", "*.layer.11.*"])
            stages = [Train(epochs=1), Train(epochs=1, unfreeze=top.values())]
    """
    if which is False:
        return {}
    parameters = dict(module.named_parameters())
    names = list(parameters)
    if which is True:
        chosen = names
    elif isinstance(which, int):
        chosen = _of_first_layers(names, which)
    else:
        chosen = _matching("freeze", names, [which] if isinstance(which, str) else list(which))
    return {name: parameters[name] for name in chosen}


def param_groups(
    module: nn.Module, options: Mapping[str, Mapping[str, Any]], *, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    r"""Divide the dense parameters of a model into groups for an optimizer, by patterns of names and by layer.

    With ``layer_decay`` $d$, the learning rate of layer $i$ of $n$ is $d^{n - i}$ times that of its pattern, with $i$
    from 0, and that of embeddings below the layers $d^{n + 1}$ times. Parameters above the layers keep the rate of
    their pattern.

    Args:
        module: The model. Frozen parameters are included, so that they can be unfrozen, and embedding tables, which
            have their own optimizers, are not.
        options: Options of the optimizer by pattern, such as ``{"tower.*": {"lr": 2e-5}}``, with ``*`` and ``?``. A
            parameter has the options of the first pattern that matches its whole name.
        layer_decay: Factor from each layer to the one below, above 0 and at most 1, for the parameters that a pattern
            matches. None for equal learning rates.

    Returns:
        Groups for the optimizers of torch, each with the names of its parameters as ``names``. The last one has the
        parameters that no pattern matches, and no options.

    Raises:
        ValueError: If a pattern matches no parameter that an earlier one does not, the decay is out of range, or it
            has no "lr" to multiply.

    Example:
        >>> layers = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        >>> model = nn.ModuleDict({"layers": layers, "head": nn.Linear(1, 1)})
        >>> for group in param_groups(model, {"layers.*": {"lr": 0.1}}, layer_decay=0.5):
        ...     print(group.get("lr"), group["names"])
        0.025 ['layers.0.weight', 'layers.0.bias']
        0.05 ['layers.1.weight', 'layers.1.bias']
        None ['head.weight', 'head.bias']

    References:
        K. Clark et al.: ELECTRA: Pre-training text encoders as discriminators rather than generators. ICLR 2020.
    """
    if layer_decay is not None:
        check_number("param_groups", "layer_decay", layer_decay)
        if not 0 < layer_decay <= 1:
            raise ValueError(f"param_groups: layer_decay must be above 0 and at most 1, got {layer_decay}")
    parameters = {name: each for name, each in module.named_parameters() if not isinstance(each, Anchor)}
    remaining = list(parameters)
    heights = _heights(remaining)
    groups: list[dict[str, Any]] = []
    for pattern, own in options.items():
        _matching("param_groups", list(parameters), [pattern])
        chosen = [name for name in remaining if fnmatchcase(name, pattern)]
        if not chosen:
            raise ValueError(
                f"param_groups: earlier patterns match all parameters of {pattern!r}; put it before "
                f"{next(iter(options))!r}"
            )
        if layer_decay is not None and "lr" not in own:
            raise ValueError(f"param_groups: layer_decay needs a learning rate; add 'lr' to the options of {pattern!r}")
        remaining = [name for name in remaining if name not in set(chosen)]
        # Without decay all have the same rate.
        by_height: dict[int, list[str]] = {}
        for name in chosen:
            by_height.setdefault(0 if layer_decay is None else heights.get(name, 0), []).append(name)
        for height in sorted(by_height, reverse=True):
            rate = {} if layer_decay is None else {"lr": own["lr"] * layer_decay**height}
            groups.append({**own, **rate, "names": by_height[height]})
    if remaining:
        groups.append({"names": remaining})
    return [{"params": [parameters[name] for name in group["names"]], **group} for group in groups]


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


def _heights(names: Sequence[str]) -> dict[str, int]:
    """Return the distance of parameters to the output of their stack of layers, which may be one of several.

    The last layer has the distance 1. Embeddings belong to the innermost module that contains a stack and embeddings.
    """
    layers: dict[str, set[int]] = {}
    for name in names:
        if found := _LAYER.search(name):
            layers.setdefault(name[: found.start(1)], set()).add(int(found[1]))
    heights = {}
    below = [name for name in names if layer_of(name) is None and _BEFORE_LAYERS.search(name)]
    for stack, numbers in layers.items():
        count = max(numbers) + 1
        for name in names:
            if name.startswith(stack):
                heights[name] = count - int(name[len(stack) :].partition(".")[0])
        parts = stack.split(".")
        roots = ["".join(f"{part}." for part in parts[:length]) for length in range(len(parts) - 2, -1, -1)]
        owned = ([name for name in below if name.startswith(root)] for root in roots)
        heights |= dict.fromkeys(next((some for some in owned if some), []), count + 1)
    return heights


def _matching(where: str, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match any pattern."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names[:3])
            raise ValueError(
                f"{where}: the pattern {pattern!r} matches no parameter; the nearest names are "
                f"{', '.join(map(repr, near))}, and '*' matches any text"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
