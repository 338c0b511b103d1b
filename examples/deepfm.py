"""DeepFM with its tower in torch, in JAX, or in both: what examples/frappe.py and examples/demo.py train.

Guo, Tang, Ye, Li, He: DeepFM: a factorization-machine based neural network for CTR prediction. IJCAI 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.ragged import Batch

HIDDEN = (300, 300, 300)
TOWERS = ("torch", "jax", "both")


class TorchTower(nn.Module):
    """Linear, layer norm, ReLU and dropout, three times, and one number a sample at the end."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in zip((width, *HIDDEN), HIDDEN, strict=False):
            linear = nn.Linear(inner, outer)
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.LayerNorm(outer), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """[B, …] parts side by side → [B]."""
        return self.layers(torch.cat(list(parts), dim=1)).squeeze(1)


class JaxMlp(nn.Module):
    """The same tower as a JAX function; the embeddings go in as they are, without a copy.

    Dropout's random bits come from torch's generator: one seed a call, so that ``torch.manual_seed`` fixes them too.
    """

    def __init__(self, width: int, dropout: float, seed: int) -> None:
        super().__init__()
        import jax
        import jax.numpy as jnp

        from recis_hybrid.bridge import JaxTower

        def mlp(params: Any, seed: Any, keep: Any, *parts: Any) -> Any:
            x = jnp.concatenate(parts, axis=1)
            keys = jax.random.split(jax.random.wrap_key_data(seed, impl="threefry2x32"), len(params["hidden"]))
            for layer, key in zip(params["hidden"], keys, strict=True):
                x = x @ layer["w"] + layer["b"]
                x = (x - x.mean(1, keepdims=True)) * jax.lax.rsqrt(x.var(1, keepdims=True) + 1e-5)
                x = jax.nn.relu(x * layer["scale"] + layer["shift"])
                # keep is 1 in evaluation: every number of the uniform draw lies below it.
                x = jnp.where(jax.random.uniform(key, x.shape) < keep, x / keep, 0.0)
            return (x @ params["out"]["w"] + params["out"]["b"])[:, 0]

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

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """[B, …] parts side by side → [B]."""
        seed = torch.empty(2, dtype=torch.int32).random_().view(torch.uint32)
        keep = torch.tensor(1.0 - self.dropout if self.training else 1.0)
        return self.tower(seed, keep, *parts)  # type: ignore[no-any-return]


def make_towers(choice: str, width: int, dropout: float, seed: int) -> nn.ModuleList:
    """Returns the towers of a choice; with "both" there are two, and their outputs are averaged."""
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
    """

    def __init__(
        self, lookup: nn.Module, fields: Sequence[str], towers: nn.ModuleList, dense: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.lookup = lookup
        self.fields = list(fields)
        self.towers = towers
        self.dense = list(dense)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Tensor:
        """Batch → logits [B]."""
        embeddings = self.lookup(batch)
        parts = [embeddings[field] for field in self.fields]
        both = torch.stack(parts, dim=1)
        first_order, factors = both[:, :, 0].sum(1), both[:, :, 1:]
        pairs = 0.5 * (factors.sum(1).square() - factors.square().sum(1)).sum(1)
        if self.dense:
            parts.append(torch.stack([batch[column] for column in self.dense], dim=1))  # type: ignore[arg-type]
        deep = torch.stack([tower(parts) for tower in self.towers]).mean(0)
        return self.bias + first_order + pairs + deep
