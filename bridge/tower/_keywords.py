"""What a tower hands its function besides parameters and inputs: a random key, its mode, static values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import torch

KEY_IMPL = "threefry2x32"
"""Named, so that the numbers drawn do not depend on `jax_default_prng_impl`."""


def keywords(f: Callable[..., Any]) -> frozenset[str]:
    """Which of `key`, `train` and `masks` a function has as keyword-only parameters, and so wants from its tower."""
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # made in C: it says nothing of itself
        return frozenset()
    named = {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    return frozenset(named & {"key", "train", "masks"})


def draw_key() -> torch.Tensor:
    """(2,) uint32: a key's data, drawn from torch's generator of the CPU.

    So `torch.manual_seed` decides it, and activation checkpointing, which restores that generator, draws it again.
    """
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32).view(torch.uint32)


def as_key(data: Any) -> Any:
    """The typed PRNG key of a key's data."""
    return jax.random.wrap_key_data(data, impl=KEY_IMPL)


def static_signature(static: Mapping[str, Any], where: str) -> tuple[Hashable, ...]:
    """What stands for the keyword arguments in a signature.

    Raises:
        TypeError: if one is a tensor or an array, or cannot be hashed.
    """
    parts: list[Hashable] = []
    for name in sorted(static):
        value = static[name]
        if isinstance(value, torch.Tensor | jax.Array):
            raise TypeError(
                f"{where}: the keyword {name!r} is a {type(value).__qualname__}; keywords are static, a new value "
                "compiles anew: pass tensors by position"
            )
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{where}: the keyword {name!r} is a {type(value).__qualname__}, which cannot be hashed; keywords are "
                "static: pass a tuple, say, instead of a list"
            ) from None
        parts.append((name, type(value), value))  # the type, because 1 == True == 1.0
    return tuple(parts)
