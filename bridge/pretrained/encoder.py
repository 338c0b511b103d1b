"""An encoder: the parameters that it needs and its forward function, and the reading of its configuration."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

Weights = Mapping[str, jax.Array]
"""The parameters of an encoder, by the names in ``Encoder.weights`` and ``Encoder.optional``."""
Shapes = dict[str, tuple[int, ...]]
"""Shapes of parameters, by name."""

_LISTED = 5
"""The number of names that an error lists."""
_LEGACY = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
"""Names in files of early BERT checkpoints, and those of today."""
_BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|mask_token)$")
"""Tensors in files that the forward function computes or does not use."""


class Output(NamedTuple):
    """The result of an encoder."""

    last_hidden_state: jax.Array
    """``[B, T, H]``, the hidden states after the last layer, in the dtype of the weights."""
    pooler_output: jax.Array | None
    """``[B, P]``, the family's own summary of each input; None if the family or the checkpoint has none."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A pretrained architecture, of one configuration, as a pure function.

    Example:
        >>> from recis_hybrid.bridge.pretrained import encoder
        >>> vit = encoder({"model_type": "vit", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1})
        >>> vit.weights["layers.0.attention.q_proj.weight"]
        (8, 8)
    """

    name: str
    """The ``model_type`` of the configuration."""
    weights: Shapes
    """Names of the required parameters, those of the module that ``transformers.AutoModel`` builds, and their shapes.
    Linear weights are ``[out, in]``."""
    optional: Shapes = field(default_factory=dict)
    """Parameters of the pooler, which a checkpoint has all or none of."""
    inputs: tuple[str, ...]
    """Names of the positional arguments of ``forward`` after the weights. Only the first one is required."""
    max_length: int | None = None
    """The largest number of tokens per row; None if there is no limit."""
    threshold: int | None = None
    """A number of tokens per row beyond which all hidden states change, so that padding must not exceed it."""
    prefixes: tuple[str, ...] = ()
    """Prefixes of the names in the files of larger models, such as "bert."."""
    renames: tuple[tuple[str, str], ...] = ()
    """Regular expressions and replacements from names in files to names of parameters, applied in order."""
    forward: Callable[..., Output]
    """``forward(weights, *inputs, key=None) -> Output``, which jit and grad can trace.

    The inputs are those in ``inputs``, by position or name. The computation is in the dtype of the weights, with
    normalization and softmax in at least float32. An entry ``layers.COMPUTE`` of the weights is another dtype for
    linear layers and attention; hidden states between layers then remain in the dtype of the weights. Token ids outside
    the vocabulary give NaN. ``key`` is a PRNG key for dropout at the rates of the configuration; None disables dropout.

    Products of float32 have the precision of ``jax_default_matmul_precision``, whose default is below float32 on some
    accelerators.
    """

    def match(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
        """Find the encoder's parameters in a checkpoint, by the names and shapes in its files.

        Args:
            shapes: Shapes of all tensors of the checkpoint, by name. Heads of larger models are ignored.

        Returns:
            The checkpoint's name of each parameter, including the optional ones if the checkpoint has them, in the
            order of ``weights``.

        Raises:
            ValueError: if parameters are missing, shapes differ, or the checkpoint has a parameter in one of the
                encoder's modules that the configuration does not have, such as the bias of a layer without one.
        """
        where = f"encoder {self.name!r}"
        named = max((self._own(shapes, prefix) for prefix in ("", *self.prefixes)), key=self._count)
        if not self._count(named):
            raise ValueError(
                f"{where}: the checkpoint has none of its parameters, such as {_some(self.weights)}; it has "
                f"{_some(shapes)}; check that config.json and the weights belong together"
            )
        expected = dict(self.weights)
        if any(name in named for name in self.optional):
            expected |= self.optional
        if missing := [name for name in expected if name not in named]:
            raise ValueError(f"{where}: the checkpoint lacks {_some(missing)}; check that all of its files are present")
        for name, shape in expected.items():
            if tuple(shapes[named[name]]) != shape:
                raise ValueError(
                    f"{where}: parameter {named[name]!r} must have shape {list(shape)} by config.json, got "
                    f"{list(shapes[named[name]])}; check that config.json and the weights belong together"
                )
        roots = {name.partition(".")[0] for name in (*self.weights, *self.optional)}
        unknown = [
            file_name
            for name, file_name in named.items()
            if name not in expected and name.partition(".")[0] in roots and not _BUFFERS.search(name)
        ]
        if unknown:
            raise ValueError(
                f"{where}: the checkpoint has parameters that config.json does not provide for: {_some(unknown)}; "
                "check that config.json and the weights belong together"
            )
        return {name: named[name] for name in expected}

    def _own(self, shapes: Mapping[str, Any], prefix: str) -> dict[str, str]:
        """Map the encoder's names to the checkpoint's names, for the names with a prefix."""
        named = {}
        for file_name in shapes:
            if file_name.startswith(prefix):
                name = file_name.removeprefix(prefix)
                for pattern, replacement in (*_LEGACY, *self.renames):
                    name = re.sub(pattern, replacement, name)
                named[name] = file_name
        return named

    def _count(self, named: Mapping[str, str]) -> int:
        """Return the number of required parameters among names."""
        return sum(name in self.weights for name in named)


class Config:
    """Fields of a ``config.json``, checked when read.

    Args:
        fields: The fields, by name. A field that is None has its default.

    Raises:
        ValueError: from each method, with the model type, the field and its value.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        self.name = str(fields["model_type"])
        self.where = f"encoder {self.name!r}"

    def size(self, name: str, default: int) -> int:
        """Return a positive integer."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.where}: {name} must be a positive integer, got {value!r}")
        return value

    def sides(self, name: str, default: int) -> tuple[int, int]:
        """Return height and width, from a positive integer or two of them."""
        value = self._get(name, default)
        sides = value if isinstance(value, list | tuple) else [value, value]
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(f"{self.where}: {name} must be a positive integer or two of them, got {value!r}")
        return sides[0], sides[1]

    def token(self, name: str, default: int | None) -> int | None:
        """Return a token id, or None where the configuration says null."""
        value = self.fields.get(name, default)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{self.where}: {name} must be an integer or null, got {value!r}")
        return value

    def number(self, name: str, default: float, below: float = float("inf")) -> float:
        """Return a number that is at least 0 and less than ``below``."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < below:
            bound = "of at least 0" if below == float("inf") else f"from 0 to less than {below}"
            raise ValueError(f"{self.where}: {name} must be a number {bound}, got {value!r}")
        return float(value)

    def rate(self, name: str, default: float) -> float:
        """Return a dropout rate, from 0 to less than 1."""
        return self.number(name, default, below=1)

    def flag(self, name: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {name} must be true or false, got {value!r}")
        return value

    def choice(self, name: str, known: Mapping[str, Any], default: str) -> Any:
        """Return the object that ``known`` has for a field, such as the function of an activation."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in known:
            raise ValueError(
                f"{self.where}: {name} {value!r} is not implemented, only {', '.join(sorted(known))}; use "
                "transformers' own module, in torch"
            )
        return known[value]

    def require(self, **allowed: Any) -> None:
        """Refuse fields that have another value than the one given, which is also their default."""
        for name, value in allowed.items():
            if self._get(name, value) != value:
                raise ValueError(
                    f"{self.where}: {name}={self.fields[name]!r} is not implemented, only {value!r}; use transformers' "
                    "own module, in torch"
                )

    def heads(self, hidden_size: int, default: int, name: str = "num_attention_heads") -> int:
        """Return the number of attention heads, which divides the hidden size."""
        heads = self.size(name, default)
        if hidden_size % heads:
            raise ValueError(f"{self.where}: hidden_size {hidden_size} must be a multiple of {name} {heads}")
        return heads

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        return default if value is None else value


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Return the first of names, and the number of others, as text."""
    listed = list(names)
    others = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(map(repr, listed[:_LISTED])) + others
