"""Mixture: several sources mixed by proportion."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from recis_hybrid.pipelines.arguments import check_batches
from recis_hybrid.pipelines.data.resumable_source import Reader
from recis_hybrid.ragged import Batch
from recis_hybrid.validation import check_integer, check_number, check_type


class Mixture:
    """An endless stream of batches, each from a randomly drawn source. A source that ends starts again.

    The draws depend only on the seed, so all ranks draw the same source at the same step. The state of the draws and
    the positions of the sources can be saved.

    Args:
        sources: Sources by name.
        proportions: Relative frequency of each source, by name; above 0.
        seed: Seed of the draws.

    Raises:
        ValueError: The names differ, or a proportion is not a finite number above 0.

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
        for name, mapping in (("sources", sources), ("proportions", proportions)):
            check_type("Mixture", name, mapping, Mapping, "a mapping by name, such as {'ads': ...}")
        if set(sources) != set(proportions) or not sources:
            raise ValueError(
                f"Mixture: sources and proportions must have the same names, got {sorted(sources)} and "
                f"{sorted(proportions)}"
            )
        for name, share in proportions.items():
            check_number("Mixture", f"the proportion of {name!r}", share)
            check_batches("Mixture", f"the source {name!r}", sources[name])
            if not (share > 0 and math.isfinite(share)):
                raise ValueError(f"Mixture: the proportion of {name!r} must be a finite number above 0, got {share}")
        check_integer("Mixture", "seed", seed, low=0)
        self._readers = {name: Reader(source) for name, source in sources.items()}
        self._shares = torch.tensor([proportions[name] for name in sources], dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        """Continue where the last iterator stopped."""
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
        """Return the state of the draws and the positions of the sources."""
        readers = {name: reader.state_dict() for name, reader in self._readers.items()}
        return {"generator": self._generator.get_state(), "readers": readers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        self._generator.set_state(state["generator"])
        for name, reader in self._readers.items():
            reader.load_state_dict(state["readers"][name])
