"""Random generators of the process: seeded together, saved together."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from recis_hybrid.pipelines.arguments import refuse_no_count
from recis_hybrid.pipelines.metrics_record import RunningMeans


def seed_everything(seed: int, *, rank: int = 0) -> None:
    """Seeds the generators of torch (all devices), numpy and Python.

    Ranks get generators that differ, or they would drop out the same neurons. Tables and readers have seeds of their
    own, which must be the same on all ranks.

    Args:
        seed: Not negative.
        rank: This process's number.

    Example:
        >>> seed_everything(3)
        >>> first = torch.rand(1)
        >>> seed_everything(3)
        >>> bool(first == torch.rand(1))
        True
    """
    refuse_no_count("seed_everything", "seed", seed, 0)
    mixed = int(np.random.SeedSequence([seed, rank]).generate_state(1)[0])
    torch.manual_seed(mixed)
    np.random.seed(mixed)
    random.seed(mixed)


class Generators:
    """All generators and log sums as a part of checkpoints, separate for each rank.

    Args:
        means: The sums.
    """

    def __init__(self, means: RunningMeans) -> None:
        self._means = means

    def state_dict(self) -> dict[str, Any]:
        """Return their states."""
        return {**generator_states(), "means": self._means.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        set_generator_states(state)
        if "means" in state:
            self._means.load_state_dict(state["means"])


def generator_states() -> dict[str, Any]:
    """Return the state of all of them, as a checkpoint can hold it."""
    of_numpy: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, cached = of_numpy
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
    """Take over what :func:`generator_states` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    of_numpy, of_python = states["numpy"], states["python"]
    keys = of_numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, of_numpy["position"], of_numpy["has_gauss"], of_numpy["cached"]))
    random.setstate((of_python["version"], tuple(of_python["words"].tolist()), of_python["gauss"]))
