"""DeepFM with its tower in torch, in JAX, or in both: what examples/frappe.py and examples/demo.py train.

Guo, Tang, Ye, Li, He: DeepFM: a factorization-machine based neural network for CTR prediction. IJCAI 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.ragged import Batch

HIDDEN = (400, 400, 400)
MOMENTUM = 0.1  # of running statistics, torch's default
TOWERS = ("torch", "jax", "both")


class TorchTower(nn.Module):
    """Linear, batch norm, ReLU and dropout, three times, and one number a sample at the end."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in zip((width, *HIDDEN), HIDDEN, strict=False):
            linear = nn.Linear(inner, outer)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.BatchNorm1d(outer), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """[B, …] parts side by side → [B]."""
        return self.layers(torch.cat(list(parts), dim=1)).squeeze(1)


class JaxMlp(nn.Module):
    """The same tower as a JAX function; the embeddings go in as they are, without a copy.

    Dropout's random bits come from torch's generator: one seed a call, so that ``torch.manual_seed`` fixes them too.
    The function is pure, so batch norm's statistics are an output of it, and their running means, kept here, an input.
    """

    def __init__(self, width: int, dropout: float, seed: int) -> None:
        super().__init__()
        import jax
        import jax.numpy as jnp

        from recis_hybrid.bridge import JaxTower

        def mlp(params: Any, seed: Any, keep: Any, training: Any, running: Any, *parts: Any) -> Any:
            x = jnp.concatenate(parts, axis=1)
            statistics = []
            keys = jax.random.split(jax.random.wrap_key_data(seed, impl="threefry2x32"), len(params["hidden"]))
            for layer, key, kept in zip(params["hidden"], keys, running, strict=True):
                x = x @ layer["w"] + layer["b"]
                batch = jnp.stack([x.mean(0), x.var(0)])
                statistics.append(batch)
                mean, var = jnp.where(training, batch, kept)
                x = (x - mean) * jax.lax.rsqrt(var + 1e-5)
                x = jax.nn.relu(x * layer["scale"] + layer["shift"])
                # keep is 1 in evaluation: every number of the uniform draw lies below it.
                x = jnp.where(jax.random.uniform(key, x.shape) < keep, x / keep, 0.0)
            return (x @ params["out"]["w"] + params["out"]["b"])[:, 0], statistics

        def dense(key: Any, inner: int, outer: int) -> dict[str, Any]:
            return {"w": jax.nn.initializers.glorot_normal()(key, (inner, outer)), "b": jnp.zeros(outer)}

        keys = jax.random.split(jax.random.key(seed), len(HIDDEN) + 1)
        widths = (width, *HIDDEN)
        params = {
            "hidden": [
                {**dense(key, inner, outer), "scale": jnp.ones(outer), "shift": jnp.zeros(outer)}
                for key, inner, outer in zip(keys, widths, HIDDEN, strict=False)
            ],
            "out": dense(keys[-1], HIDDEN[-1], 1),
        }
        self.dropout = dropout
        self.tower = JaxTower(mlp, params)
        for number, outer in enumerate(HIDDEN):
            self.register_buffer(f"running{number}", torch.stack([torch.zeros(outer), torch.ones(outer)]))

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """[B, …] parts side by side → [B]."""
        seed = torch.empty(2, dtype=torch.int32).random_().view(torch.uint32)
        keep = torch.tensor(1.0 - self.dropout if self.training else 1.0)
        running = [getattr(self, f"running{number}") for number in range(len(HIDDEN))]
        output, statistics = self.tower(seed, keep, torch.tensor(self.training), running, *parts)
        if self.training:
            for kept, batch in zip(running, statistics, strict=True):
                kept.lerp_(batch.detach(), MOMENTUM)
        return output  # type: ignore[no-any-return]


def make_towers(choice: str, width: int, dropout: float, seed: int) -> nn.ModuleList:
    """Return the towers of a choice; with "both" there are two, and their outputs are averaged."""
    towers = nn.ModuleList()
    if choice in ("torch", "both"):
        towers.append(TorchTower(width, dropout))
    if choice in ("jax", "both"):
        towers.append(JaxMlp(width, dropout, seed))
    return towers


class DeepFM(nn.Module):
    """Logit = bias + sum of first-order weights + factorization machine + mean of the towers.

    An embedding's first element is its id's first-order weight, the others its factors: one lookup serves both.

    Args:
        lookup: Batch → by field [B, 1 + factors]: an EmbeddingEngine, or what stands in for one.
        fields: The fields, in order.
        towers: Each takes a sequence of [B, …] parts and gives [B].
        dense: Columns of the batch, float32 [B], that the towers take beside the embeddings.
        l2: Weight of half the squared embeddings that ``loss`` adds: of a batch's ids, each id taken once (the fields
            are int64 [B] then), or of ``regularized``.
        regularized: Further outputs of ``lookup`` in training mode, whose squares count in the place of the batch's.
    """

    def __init__(
        self,
        lookup: nn.Module,
        fields: Sequence[str],
        towers: nn.ModuleList,
        dense: Sequence[str] = (),
        l2: float = 0.0,
        regularized: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.lookup = lookup
        self.fields = list(fields)
        self.towers = towers
        self.dense = list(dense)
        self.bias = nn.Parameter(torch.zeros(1))
        self.l2 = l2
        self.regularized = list(regularized)
        self.penalty = torch.zeros(())

    def forward(self, batch: Batch) -> Tensor:
        """Batch → logits [B]."""
        embeddings = self.lookup(batch)
        parts = [embeddings[field] for field in self.fields]
        both = torch.stack(parts, dim=1)
        first_order, factors = both[:, :, 0].sum(1), both[:, :, 1:]
        pairs = 0.5 * (factors.sum(1).square() - factors.square().sum(1)).sum(1)
        self.penalty = both.new_zeros(())
        if self.training and self.regularized:
            self.penalty = self.l2 / 2 * torch.stack([embeddings[n].square().sum() for n in self.regularized]).sum()
        elif self.training and self.l2:
            self.penalty = self._half_squares(batch, both)
        if self.dense:
            parts.append(torch.stack([batch[column] for column in self.dense], dim=1))  # type: ignore[arg-type]
        deep = torch.stack([tower(parts) for tower in self.towers]).mean(0)
        return self.bias + first_order + pairs + deep

    def _half_squares(self, batch: Batch, embeddings: Tensor) -> Tensor:
        shares = []
        for field in self.fields:
            _, inverse, counts = batch[field].unique(return_inverse=True, return_counts=True)  # type: ignore[union-attr]
            shares.append(1 / counts[inverse])
        return self.l2 / 2 * (torch.stack(shares, dim=1) * embeddings.square().sum(2)).sum()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy, and the penalty of the embeddings just looked up."""
        return nn.functional.binary_cross_entropy_with_logits(logits, labels) + self.penalty
