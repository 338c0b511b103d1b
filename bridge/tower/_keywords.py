"""Keywords of a tower's function: a random key, the mode, masks, and static values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import torch

KEY_IMPL = "threefry2x32"
"""PRNG implementation, fixed so that random numbers do not depend on ``jax_default_prng_impl``."""


def keyword_names(f: Callable[..., Any]) -> frozenset[str]:
    """Return the subset of ``key``, ``train`` and ``masks`` that are keyword-only parameters of a function."""
    try:
        parameters = inspect.signature(f).parameters.values()
    except (TypeError, ValueError):  # functions written in C have no signature
        return frozenset()
    named = {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    return frozenset(named & {"key", "train", "masks"})


def draw_key() -> torch.Tensor:
    """Return the data of a PRNG key, uint32 ``(2,)``, drawn from torch's CPU generator.

    ``torch.manual_seed`` therefore determines it, and activation checkpointing, which restores that generator, draws
    the same key again.
    """
    return torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32).view(torch.uint32)


def as_key(data: Any) -> Any:
    """Return the typed PRNG key with this data, uint32 ``(2,)``."""
    return jax.random.wrap_key_data(data, impl=KEY_IMPL)


def static_signature(static: Mapping[str, Any], where: str) -> tuple[Hashable, ...]:
    """Return the hashable form of static keyword arguments.

    Args:
        static: The arguments by name.
        where: The prefix of error messages.

    Raises:
        TypeError: if a value is a tensor or an array, or cannot be hashed.
    """
    parts: list[Hashable] = []
    for name in sorted(static):
        value = static[name]
        if isinstance(value, torch.Tensor | jax.Array):
            raise TypeError(
                f"{where}: the keyword {name!r} is a {type(value).__qualname__}, but keywords are static, and each new "
                "value triggers a compilation; pass tensors by position"
            )
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"{where}: the keyword {name!r} is a {type(value).__qualname__}, which cannot be hashed, but keywords "
                "are static; pass a hashable value, such as a tuple instead of a list"
            ) from None
        parts.append((name, type(value), value))  # the type, because 1 == True == 1.0
    return tuple(parts)
