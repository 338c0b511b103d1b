"""Seeding and state of the process's random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from recis_hybrid.validation import check_integer


def seed_everything(seed: int, *, rank: int = 0) -> None:
    """Seed the generators of torch (all devices), NumPy and Python.

    Each rank gets a different seed; otherwise all would draw the same dropout masks. Tables and readers have their own
    seeds, which must be equal on all ranks.

    Args:
        seed: A non-negative integer.
        rank: Rank of this process.

    Example:
        >>> seed_everything(3)
        >>> first = torch.rand(1)
        >>> seed_everything(3)
        >>> bool(first == torch.rand(1))
        True
    """
    check_integer("seed_everything", "seed", seed, low=0)
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


def generator_states() -> dict[str, Any]:
    """Return the states of all generators, in a form that checkpoints can store."""
    numpy_state: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = numpy_state
    version, words, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": {
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Restore the states that :func:`generator_states` returned."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    numpy_state, python_state = states["numpy"], states["python"]
    keys = numpy_state["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy_state["position"], numpy_state["has_gauss"], numpy_state["cached"]))
    random.setstate((python_state["version"], tuple(python_state["words"].tolist()), python_state["gauss"]))
