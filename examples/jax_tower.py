"""One model whose tower is written in torch, in Flax nnx or in Equinox: nothing else of the program changes.

    python examples/jax_tower.py --tower equinox

All three start from the same weights, so that they learn the same but for rounding. The embeddings go into the JAX
towers without a copy; their parameters are torch's, and one torch optimizer trains all. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ctr_log
import demo
import torch
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.embedding import dense_parameters
from recis_hybrid.features import FeatureEngine
from recis_hybrid.metrics import AUC, LogLoss
from recis_hybrid.pipelines import Evaluate, ProgressBar, TorchStep, Train, Trainer
from recis_hybrid.ragged import Batch

HIDDEN = (128, 64)
TOWERS = ("torch", "nnx", "equinox")
Weights = Sequence[tuple[Tensor, Tensor]]  # (inner, outer) and (outer,) of each layer


def draw_weights(width: int) -> Weights:
    """First values, by torch's generator."""
    sizes = (width, *HIDDEN, 1)
    return [(nn.init.xavier_normal_(torch.empty(inner, outer)), torch.zeros(outer)) for inner, outer in pairwise(sizes)]


def torch_tower(weights: Weights) -> nn.Module:
    layers: list[nn.Module] = []
    for w, b in weights:
        linear = nn.Linear(*w.shape)
        with torch.no_grad():
            linear.weight.copy_(w.t())
            linear.bias.copy_(b)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def nnx_tower(weights: Weights) -> nn.Module:
    import jax
    from flax import nnx

    from recis_hybrid.bridge import from_nnx, to_jax

    class Mlp(nnx.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.layers = nnx.List([nnx.Linear(*w.shape, rngs=rngs) for w, _ in weights])
            for layer, (w, b) in zip(self.layers, weights, strict=True):
                layer.kernel[...], layer.bias[...] = to_jax(w), to_jax(b)

        def __call__(self, x: Any) -> Any:
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](x)

    return from_nnx(Mlp())


def equinox_tower(weights: Weights) -> nn.Module:
    import equinox
    import jax

    from recis_hybrid.bridge import from_equinox, to_jax

    class Mlp(equinox.Module):  # type: ignore[misc]
        layers: list[Any]

        def __init__(self) -> None:
            self.layers = [
                equinox.tree_at(
                    lambda linear: (linear.weight, linear.bias),
                    equinox.nn.Linear(*w.shape, key=jax.random.key(0)),
                    (to_jax(w).T, to_jax(b)),
                )
                for w, b in weights
            ]

        def __call__(self, x: Any) -> Any:  # one sample; from_equinox maps it over the batch
            for layer in self.layers[:-1]:
                x = jax.nn.relu(layer(x))
            return self.layers[-1](x)

    return from_equinox(Mlp())


def make_tower(choice: str, width: int) -> nn.Module:
    """(B, width) → (B, 1)."""
    makers = {"torch": torch_tower, "nnx": nnx_tower, "equinox": equinox_tower}
    return makers[choice](draw_weights(width))


class Model(nn.Module):
    """Embeddings and plain numbers side by side, and a tower over them."""

    def __init__(self, tower: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.lookup = demo.make_engine(seed)
        self.tower = make_tower(tower, len(demo.FIELDS) * (1 + demo.FACTORS) + len(demo.NUMBERS))

    def forward(self, batch: Batch) -> Tensor:
        """Batch → logits [B]."""
        embeddings = self.lookup(batch)
        numbers = torch.stack([batch[name] for name in demo.NUMBERS], dim=1)  # type: ignore[arg-type]
        parts = [*(embeddings[field] for field in demo.FIELDS), numbers]
        logits: Tensor = self.tower(torch.cat(parts, dim=1))
        return logits.squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=TOWERS, default="nnx", help="what the tower is written in (nnx)")
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the log (200000)")
    parser.add_argument("--epochs", type=int, default=1, help="passes over the training rows (1)")
    parser.add_argument("--batch-size", type=int, default=2048, help="samples a step (2048)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args()

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        best = ctr_log.write_log(Path(folder), args.rows, args.seed)
        columns = [*demo.IDS, "history", "site", *demo.NUMBERS, "label"]
        train, test = (
            ColumnDataset(
                Path(folder) / split,
                columns,
                args.batch_size,
                shuffle=split == "train",
                seed=args.seed,
                transforms=FeatureEngine(demo.FEATURES),
            )
            for split in ("train", "test")
        )
        model = Model(args.tower, args.seed)
        sparse = optim.Adam(model.lookup.parameters(), lr=2e-3)
        dense = torch.optim.Adam(dense_parameters(model), lr=1e-3)
        step = TorchStep(model, nn.functional.binary_cross_entropy_with_logits, [dense, sparse])
        metrics, callbacks = {"auc": AUC(), "logloss": LogLoss()}, [] if args.quiet else [ProgressBar()]
        trainer = Trainer(step, train, test, metrics=metrics, callbacks=callbacks)
        start = time.perf_counter()
        trainer.fit([Train(epochs=args.epochs)])
        rate = trainer.samples / (time.perf_counter() - start)
        figures = trainer.fit([Evaluate()])["eval"]

    compiled = getattr(model.tower, "compilations", 0)
    print(f"\ntower in {args.tower}: AUC {figures['auc']:.4f} of {best['bayes_auc']:.4f} that is possible")
    print(f"{rate:,.0f} samples/s, {compiled} programs compiled\n")
    print(
        json.dumps(
            {
                "auc": figures["auc"],
                "logloss": figures["logloss"],
                "bayes_auc": best["bayes_auc"],
                "samples_per_s": rate,
                "seconds": time.perf_counter() - begin,
                "tower": args.tower,
                "compilations": compiled,
            }
        )
    )


if __name__ == "__main__":
    main()
