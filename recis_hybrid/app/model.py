"""Models that a configuration can ask for. Letters: B rows, F features with embeddings, D dim."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from recis_hybrid.app.config import ColumnConfig, Config, ConfigError, FeatureConfig, ModelConfig
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.pipelines.steps.step import dense_column
from recis_hybrid.ragged import Batch, RaggedTensor


class ConfigModel(nn.Module):
    """A tower over embeddings and numbers and, for ``deepfm``, a factorization machine over the embeddings beside it.

    The machine takes the first element of an embedding for the id's first-order weight, the others for its factors.

    Args:
        config: The whole configuration.
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
        """Numbers a row of each feature without an embedding."""
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
                # Its vectors are those of the inner lists, which only by chance are as many as the rows.
                raise TypeError(
                    f"features.{name} has {column.levels} levels of lists: a row must be one list of ids; write the "
                    f"column flat"
                )
        embeddings = list(self.engine(batch).values())
        numbers = [_numbers(batch, name, width) for name, width in self.numbers.items()]
        logits: Tensor = self.bias + self.tower(torch.cat([*embeddings, *numbers], dim=1)).squeeze(1)
        if self.has_machine:
            stacked = torch.stack(embeddings, dim=1)  # [B, F, D]
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
        what = "strings" if column.values.dtype == torch.uint8 else "lists of any length"
        raise TypeError(
            f"features.{name} gives {what}, and has no dim: the tower takes {width} number(s) a row. Give it a dim for "
            f"an embedding{' and ops: [{hash: {kind: farm}}]' if what == 'strings' else ''}, or leave it out"
        )
    found = dense_column(batch, name, "number")
    found = found.unsqueeze(1) if found.dim() == 1 else found
    if found.dim() != 2 or found.shape[1] != width:
        raise ValueError(
            f"features.{name} gives {list(found.shape[1:])} numbers a row, and the tower takes {width}; say how long "
            f"the lists are in data.columns.COLUMN.length"
        )
    return found.float()


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
