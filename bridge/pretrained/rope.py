"""Rotary position embeddings, with the scalings of Hugging Face configurations.

References:
    J. Su et al.: RoFormer: Enhanced transformer with rotary position embedding. arXiv 2104.09864, 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from recis_hybrid.bridge.pretrained.encoder import Config

_FIELDS: Final[Mapping[str, tuple[set[str], set[str]]]] = {
    "default": (set(), set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "longrope": (
        {"long_factor", "short_factor"},
        {"attention_factor", "factor", "original_max_position_embeddings"},
    ),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
}
"""Required and optional fields of each type, besides the type and the base."""


Frequencies = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Rope:
    """Rotations of pairs of elements by an angle proportional to the position, as transformers computes them."""

    frequencies: Frequencies
    """``[P]``, float32: the angle per position of each of P pairs."""
    scale: float
    """Factor of the rotated vectors."""
    limit: int | None = None
    """The largest length of inputs; None for any."""
    long_frequencies: Frequencies | None = None
    """``[P]``, float32: the frequencies of inputs longer than ``threshold``, if they differ."""
    threshold: int | None = None
    """The largest length of inputs with ``frequencies``; None for any."""

    def rotations(self, length: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Return the cosines and sines of the angles at positions 0 to ``length - 1``, ``[length, 1, P]``."""
        frequencies = self.frequencies
        if self.long_frequencies is not None and self.threshold is not None and length > self.threshold:
            frequencies = self.long_frequencies
        angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequencies
        return (jnp.cos(angles) * self.scale).astype(dtype), (jnp.sin(angles) * self.scale).astype(dtype)


def rotate(x: jax.Array, rotations: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the pairs of elements ``i`` and ``i + P``, and leave elements from ``2 P`` on as they are.

    Args:
        x: ``[B, T, H, D]``.
        rotations: Cosines and sines, ``[T, 1, P]``.

    Returns:
        ``[B, T, H, D]``.
    """
    cos, sin = rotations
    pairs = cos.shape[-1]
    first, second, rest = jnp.split(x, [pairs, 2 * pairs], -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)


def rope(config: Config, size: int, length: int, *, original: int | None = None, is_partial: bool = False) -> Rope:
    """Read the rotary embedding of a configuration.

    Transformers 5 has ``rope_parameters``, 4 has ``rope_theta`` and ``rope_scaling``.

    Args:
        config: The configuration.
        size: D, the size of a head.
        length: The configuration's ``max_position_embeddings``.
        original: The family's default of ``original_max_position_embeddings``; None for ``length``.
        is_partial: Whether ``partial_rotary_factor`` may exclude the last elements of a head from rotation.

    Raises:
        ValueError: if the number of elements to rotate is odd; if the type or a field of it is unknown, missing or no
            number.
    """
    fields = _parameters(config)
    kind = fields.pop("rope_type")
    size = _rotated(config, fields, size, is_partial)
    base = _number(config, fields, "rope_theta", 10_000.0)
    if kind != "dynamic":
        # An entry of the configuration itself has priority, as in transformers.
        own = config.fields.get("original_max_position_embeddings") or original
        fields["original_max_position_embeddings"] = own or fields.get("original_max_position_embeddings", length)
    frequencies = base ** -(np.arange(0, size, 2) / size)
    if kind == "longrope":
        return _longrope(config, fields, frequencies, length)
    scale = 1.0
    if kind == "linear":
        frequencies = frequencies / _number(config, fields, "factor")
    elif kind == "llama3":
        frequencies = _llama3(config, fields, frequencies)
    elif kind == "yarn":
        frequencies, scale = _yarn(config, fields, frequencies, base)
    # The scaling of "dynamic" starts where the inputs are longer than those of pretraining.
    return Rope(frequencies.astype(np.float32), scale, length if kind == "dynamic" else None)


def _parameters(config: Config) -> dict[str, Any]:
    """Return the fields of the rotary embedding, with ``rope_type`` and the names of transformers 5."""
    found = config.fields.get("rope_scaling") or config.fields.get("rope_parameters") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{config.where}: rope_parameters must be an object, got {found!r}")
    fields = {name: value for name, value in found.items() if value is not None}
    older = fields.pop("type", "default")
    kind = fields.setdefault("rope_type", older)
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ValueError(
            f"{config.where}: rope_type {kind!r} is not implemented, only {', '.join(_FIELDS)}; use transformers' own "
            "module, in torch"
        )
    for name in ("rope_theta", "partial_rotary_factor"):
        if config.fields.get(name) is not None:
            fields.setdefault(name, config.fields[name])
    required, optional = _FIELDS[kind]
    if missing := required - fields.keys():
        raise ValueError(f"{config.where}: rope_type {kind!r} requires {', '.join(sorted(missing))} in rope_parameters")
    if unknown := fields.keys() - required - optional - {"rope_type", "rope_theta", "partial_rotary_factor"}:
        raise ValueError(
            f"{config.where}: rope_parameters of type {kind!r} may not have {', '.join(map(repr, sorted(unknown)))}; "
            "use transformers' own module, in torch"
        )
    return fields


def _rotated(config: Config, fields: Mapping[str, Any], size: int, is_partial: bool) -> int:
    """Return the number of elements of a head that are rotated."""
    share = _number(config, fields, "partial_rotary_factor", 1.0)
    if share != 1 and not is_partial:
        # Transformers ignores the field or fails, depending on the type.
        raise ValueError(f"{config.where}: partial_rotary_factor={share!r} is not implemented, only 1")
    rotated = int(size * share)
    if share > 1 or rotated == 0 or rotated % 2:
        part = "" if share == 1 else f" after partial_rotary_factor {share} of {size}"
        raise ValueError(f"{config.where}: rotary embeddings need an even head size, got {rotated}{part}")
    return rotated


def _number(config: Config, fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Return a positive number of the rotary embedding's fields."""
    value = fields.get(name, default)
    if not _is_positive(value):
        raise ValueError(f"{config.where}: {name} in rope_parameters must be a positive number, got {value!r}")
    return float(value)


def _is_positive(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _longrope(config: Config, fields: Mapping[str, Any], frequencies: Any, length: int) -> Rope:
    """Divide each frequency by a factor of its own, which differs for inputs longer than those of pretraining.

    References:
        Y. Ding et al.: LongRoPE: Extending LLM context window beyond 2 million tokens. ICML 2024.
    """
    original = int(_number(config, fields, "original_max_position_embeddings"))
    scaled = []
    for name in ("short_factor", "long_factor"):
        factors = fields[name]
        if not isinstance(factors, list) or len(factors) != len(frequencies) or not all(map(_is_positive, factors)):
            raise ValueError(
                f"{config.where}: {name} in rope_parameters must be {len(frequencies)} positive numbers, got "
                f"{factors!r}"
            )
        scaled.append((frequencies / np.asarray(factors, np.float64)).astype(np.float32))
    factor = _number(config, fields, "factor", length / original)
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    scale = _number(config, fields, "attention_factor", default)
    return Rope(scaled[0], scale, max(length, original), scaled[1], original)


def _llama3(config: Config, fields: Mapping[str, Any], frequencies: Any) -> Any:
    """Divide low frequencies by a factor, leave high ones, and interpolate between.

    References:
        A. Grattafiori et al.: The Llama 3 herd of models. arXiv 2407.21783, 2024.
    """
    factor = _number(config, fields, "factor")
    low, high = _number(config, fields, "low_freq_factor"), _number(config, fields, "high_freq_factor")
    if low >= high:
        raise ValueError(f"{config.where}: low_freq_factor {low} must be less than high_freq_factor {high}")
    turns = _number(config, fields, "original_max_position_embeddings") * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * ((1 - smooth) / factor + smooth)


def _yarn(config: Config, fields: Mapping[str, Any], frequencies: Any, base: float) -> tuple[Any, float]:
    """Divide low frequencies by a factor, leave high ones, and scale the rotated vectors.

    References:
        B. Peng et al.: YaRN: Efficient context window extension of large language models. ICLR 2024.
    """
    factor = _number(config, fields, "factor")
    length = _number(config, fields, "original_max_position_embeddings")
    size = 2 * len(frequencies)

    def place(turns: float) -> float:
        """Return the index of the frequency that turns so many times within the length."""
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = place(_number(config, fields, "beta_fast", 32.0)), place(_number(config, fields, "beta_slow", 1.0))
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / ((high - low) or 0.001), 0, 1)

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    if "attention_factor" in fields:
        scale = _number(config, fields, "attention_factor")
    elif fields.get("mscale") and fields.get("mscale_all_dim"):
        scale = growth(_number(config, fields, "mscale")) / growth(_number(config, fields, "mscale_all_dim"))
    else:
        scale = growth(1.0)
    return frequencies * (ramp / factor + 1 - ramp), scale
