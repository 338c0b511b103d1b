"""Models of a configuration. Letters: B rows, F features with embeddings, D dim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.app.config import ColumnConfig, Config, ConfigError, FeatureConfig, ModelConfig
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.pipelines.steps.step import dense_column
from recis_hybrid.ragged import Batch, RaggedTensor


class ConfigModel(nn.Module):
    """A tower over embeddings and numbers; for ``deepfm``, plus a factorization machine over the embeddings.

    The factorization machine uses the first element of an embedding as the id's first-order weight, and the others as
    its factors.

    Args:
        config: The configuration.
        engine: The tables.

    References:
        Guo, Tang, Ye, Li, He: DeepFM: a factorization-machine based neural network for CTR prediction. IJCAI 2017.
    """

    def __init__(self, config: Config, engine: EmbeddingEngine) -> None:
        super().__init__()
        self.engine = engine
        self.numbers = {
            name: _width(name, feature, config.data.columns)
            for name, feature in config.features.items()
            if feature.dim is None
        }
        """Number of values per row of each feature without an embedding."""
        self.embedded = [name for name, feature in config.features.items() if feature.dim is not None]
        self.has_machine = config.model.kind == "deepfm"
        dims = [feature.dim for feature in config.features.values() if feature.dim is not None]
        if self.has_machine and (len(set(dims)) != 1 or dims[0] < 2):
            raise ConfigError(f"model.kind deepfm needs one dim of at least 2 for all features, got {dims}")
        self.tower = _tower(sum(dims) + sum(self.numbers.values()), config.model)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Tensor:
        """Batch → logits [B]."""
        for name in self.embedded:
            column = batch.get(name)
            if isinstance(column, RaggedTensor) and column.levels > 1 and column.values.dtype != torch.uint8:
                # The engine returns one vector per inner list, and their number equals the rows only by chance.
                raise TypeError(
                    f"features.{name} has {column.levels} levels of lists: a row must be one list of ids; flatten the "
                    f"column"
                )
        embeddings = list(self.engine(batch).values())
        numbers = [_numbers(batch, name, width) for name, width in self.numbers.items()]
        return logits_of(self, embeddings, numbers)


def logits_of(model: Any, embeddings: Sequence[Tensor], numbers: Sequence[Tensor]) -> Tensor:
    """Return logits ``[B]``.

    Args:
        model: Has the ``tower``, ``bias`` and ``has_machine`` of a ConfigModel.
        embeddings: ``[B, D]`` for each embedded feature.
        numbers: ``[B, width]`` for each other feature.
    """
    logits: Tensor = model.bias + model.tower(torch.cat([*embeddings, *numbers], dim=1)).squeeze(1)
    if model.has_machine:
        stacked = torch.stack(list(embeddings), dim=1)  # [B, F, D]
        factors = stacked[:, :, 1:]
        pairs = 0.5 * (factors.sum(1).square() - factors.square().sum(1)).sum(1)
        logits = logits + stacked[:, :, 0].sum(1) + pairs
    return logits


def _width(name: str, feature: FeatureConfig, columns: Mapping[str, ColumnConfig]) -> int:
    lengths = [columns[source].length or 1 for source in feature.sources(name) if source in columns]
    return max(lengths, default=1)


def _numbers(batch: Batch, name: str, width: int) -> Tensor:
    """Return a feature's numbers, [B, width]."""
    column = batch.get(name)
    if isinstance(column, RaggedTensor):
        kind = "strings" if column.values.dtype == torch.uint8 else "lists of any length"
        raise TypeError(
            f"features.{name} has no dim and yields {kind}, but the tower takes {width} number(s) per row. Give it a "
            f"dim for an embedding{' and ops: [{hash: {kind: farm}}]' if kind == 'strings' else ''}, or remove it"
        )
    numbers = dense_column(batch, name, "number")
    numbers = numbers.unsqueeze(1) if numbers.dim() == 1 else numbers
    if numbers.dim() != 2 or numbers.shape[1] != width:
        raise ValueError(
            f"features.{name} yields {list(numbers.shape[1:])} numbers per row, but the tower takes {width}; set the "
            f"length of the lists in data.columns.COLUMN.length"
        )
    return numbers.float()


def _tower(width: int, config: ModelConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inner, outer in pairwise((width, *config.hidden)):
        linear = nn.Linear(inner, outer)
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, *([nn.BatchNorm1d(outer)] if config.batch_norm else []), nn.ReLU()]
        if config.dropout > 0:
            layers.append(nn.Dropout(config.dropout))
    return nn.Sequential(*layers, nn.Linear(config.hidden[-1] if config.hidden else width, 1))
