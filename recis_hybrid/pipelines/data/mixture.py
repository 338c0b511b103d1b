"""Mixture: several sources read as one, by proportion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from recis_hybrid.pipelines.arguments import (
    refuse_no_batches,
    refuse_no_count,
    refuse_no_number,
    refuse_other_than,
)
from recis_hybrid.pipelines.data.resumable_source import Reader
from recis_hybrid.ragged import Batch


class Mixture:
    """An endless stream of batches, each of a source drawn by proportion; a source that ends begins again.

    The draws depend on the seed alone, so that ranks take the same source at the same step. Its place, and those of its
    sources, can be saved.

    Args:
        sources: By name.
        proportions: By name, how often a source is drawn beside the others; above 0.
        seed: Of the draws.

    Raises:
        ValueError: If names differ, or a proportion is not a finite number above 0.

    Example:
        >>> ads, organic = [{"id": torch.tensor([1])}], [{"id": torch.tensor([2])}]
        >>> stream = iter(Mixture({"ads": ads, "organic": organic}, {"ads": 3, "organic": 1}))
        >>> sum(int(next(stream)["id"]) == 1 for _ in range(400))
        312
    """

    endless = True

    def __init__(
        self, sources: Mapping[str, Iterable[Batch]], proportions: Mapping[str, float], *, seed: int = 0
    ) -> None:
        for name, given in (("sources", sources), ("proportions", proportions)):
            refuse_other_than("Mixture", name, given, Mapping, "a mapping by name, as {'ads': ...}")
        if set(sources) != set(proportions) or not sources:
            raise ValueError(
                f"Mixture: sources and proportions must have the same names, got {sorted(sources)} and "
                f"{sorted(proportions)}"
            )
        for name, share in proportions.items():
            refuse_no_number("Mixture", f"the proportion of {name!r}", share)
            refuse_no_batches("Mixture", f"the source {name!r}", sources[name])
            if not (share > 0 and math.isfinite(share)):
                raise ValueError(f"Mixture: the proportion of {name!r} must be a finite number above 0, got {share}")
        refuse_no_count("Mixture", "seed", seed, 0)
        self._readers = {name: Reader(source) for name, source in sources.items()}
        self._shares = torch.tensor([proportions[name] for name in sources], dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        """Goes on where the last iterator was left."""
        names = list(self._readers)
        while True:
            drawn = int(torch.multinomial(self._shares, 1, generator=self._generator))
            yield self._next(names[drawn])

    def _next(self, name: str) -> Batch:
        reader = self._readers[name]
        batch = reader.next()
        while batch is None:  # once, at the end of a pass
            batch = reader.next()
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the places of the sources, and of the draws."""
        readers = {name: reader.state_dict() for name, reader in self._readers.items()}
        return {"generator": self._generator.get_state(), "readers": readers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the stream go on from where it was when the state was taken."""
        self._generator.set_state(state["generator"])
        for name, reader in self._readers.items():
            reader.load_state_dict(state["readers"][name])
