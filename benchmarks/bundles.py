"""Bundles beside the engines that they were exported from: features, lookups, tower and whole requests.

    python -m benchmarks.bundles [--quick] [--ids 50000]

The model has 26 string features, hashed, with embeddings of width 16, 13 numbers with logarithms, and an MLP of widths
128 and 64. Requests of 1 and 256 rows are scored by ``serving.Bundle``, which runs NumPy and onnxruntime, and by
FeatureEngine, EmbeddingEngine and torch (the peer), on one thread. All times are process CPU time a request, without
the conversion of values to columns, which only the bundle needs (``check``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.features import Feature, FeatureEngine, Hash, Log
from recis_hybrid.publish import write_bundle
from recis_hybrid.ragged import Batch, RaggedTensor
from recis_hybrid.serving import Bundle

NUMBERS = [f"number{k}" for k in range(13)]
STRINGS = [f"string{k}" for k in range(26)]
DIM = 16
CPU = torch.device("cpu")


class Tower(nn.Module):
    """Embeddings and numbers → scores."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(len(STRINGS) * DIM + len(NUMBERS), 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(64, 1))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return scores [B]."""
        columns = [each if each.dim() == 2 else each[:, None] for each in inputs]
        return torch.sigmoid(self.layers(torch.cat(columns, 1))[:, 0])


class Model:
    """A model with trained tables, and its bundle."""

    def __init__(self, ids: int, folder: str) -> None:
        self.ids = ids
        operations = [Feature(name, ops=[Log(plus=1.0)]) for name in NUMBERS]
        operations += [Feature(name, ops=[Hash("farm")]) for name in STRINGS]
        self.features = FeatureEngine(operations, parallel=False)
        self.engine = EmbeddingEngine({name: EmbeddingConfig(dim=DIM) for name in STRINGS})
        self.tower = Tower().eval()
        for first in range(0, ids, 10_000):
            words = RaggedTensor.from_strings([f"{k:08x}" for k in range(first, min(first + 10_000, ids))])
            numbers = torch.ones(words.batch_size)
            self.engine(self.features({**dict.fromkeys(STRINGS, words), **dict.fromkeys(NUMBERS, numbers)}))
        self.engine.eval()
        inputs = [*STRINGS, *NUMBERS]
        write_bundle(
            folder,
            1,
            features=self.features,
            engine=self.engine,
            tower=self.tower,
            inputs=inputs,
            batch=self.batch(4),
        )
        self.bundle = Bundle(folder)

    def batch(self, rows: int) -> Batch:
        """Return random rows; their ids are in the tables."""
        random = np.random.default_rng(rows)
        batch: Batch = {name: torch.from_numpy(random.random(rows).astype(np.float32)) for name in NUMBERS}
        for name in STRINGS:
            batch[name] = RaggedTensor.from_strings([f"{k:08x}" for k in random.integers(self.ids, size=rows)])
        return batch

    def cases(self, rows: int) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any] | None]]:
        """Yield cases with the bundle's function and the peer's."""
        batch, bundle = self.batch(rows), self.bundle
        columns = {n: c.to_strings() if isinstance(c, RaggedTensor) else c.numpy() for n, c in batch.items()}
        checked = bundle.check(columns)
        computed = self.features(batch)
        vectors = self.engine(computed)
        inputs = [*[vectors[name] for name in STRINGS], *[computed[name] for name in NUMBERS]]
        arrays = [each.numpy() for each in inputs]
        served = bundle._program.run(checked.columns)

        def whole() -> Tensor:
            features = self.features(batch)
            found = self.engine(features)
            scores: Tensor = self.tower(*[found.get(name, features.get(name)) for name in [*STRINGS, *NUMBERS]])
            return scores

        np.testing.assert_allclose(bundle.run(checked)["score"], whole().numpy(), rtol=0, atol=1e-6)
        yield "features", lambda: bundle._program.run(checked.columns), lambda: self.features(batch)
        yield "lookups", lambda: bundle._lookups.run(bundle._tables, served), lambda: self.engine(computed)
        yield "tower", lambda: bundle._tower(arrays), lambda: self.tower(*inputs)
        yield "request", lambda: bundle.run(checked), whole
        yield "check", lambda: bundle.check(columns), None


def _step(function: Callable[[], Any]) -> Callable[[], None]:
    """Return a step of the harness, which must not return a value."""

    def step() -> None:
        function()

    return step


def main() -> None:
    """Print one JSON line for each case, and a table on stderr."""
    parser = harness.parser(__doc__ or "", ("cpu",))
    parser.add_argument("--ids", type=int, default=50_000, help="ids of each of the 26 tables")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: list[harness.Result] = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = Model(2_000 if options.quick else options.ids, folder)
        for rows in (1, 256):
            for name, ours, theirs in model.cases(rows):
                case = f"{name}, {rows} rows"
                if options.cases not in case:
                    continue
                steps = {"ours": _step(ours)} if theirs is None else {"ours": _step(ours), "peer": _step(theirs)}
                rounds = 5 if options.quick else 31
                rates = harness.rates(steps, 1, rounds, CPU, burst=20, clock="cpu")
                mine, peer = 1e6 / rates["ours"], 1e6 / rates["peer"] if "peer" in rates else None
                ratio = None if peer is None else peer / mine
                results.append(harness.Result("bundles", case, "CPU time", "us", mine, peer, "engines in torch", ratio))
                results[-1].print()
    harness.progress(harness.table(results))


if __name__ == "__main__":
    main()
