"""Recommendation models with a sparse half in torch and towers in torch or JAX.

``import recis_hybrid as rh`` gives the names that most programs need, ``rh.ColumnDataset``, ``rh.EmbeddingEngine``,
``rh.Trainer``, and the packages that hold the others, as in ``rh.optim.Adam`` and ``rh.features.Hash``. Each is
imported when it is first used: the import itself loads neither torch nor pyarrow, and only ``rh.bridge`` loads JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recis_hybrid import (
        bridge as bridge,
        columnio as columnio,
        embedding as embedding,
        features as features,
        metrics as metrics,
        optim as optim,
        pipelines as pipelines,
        publish as publish,
        ragged as ragged,
        saver as saver,
        serving as serving,
        towers as towers,
    )
    from recis_hybrid.columnio import ColumnDataset as ColumnDataset
    from recis_hybrid.embedding import (
        EmbeddingConfig as EmbeddingConfig,
        EmbeddingEngine as EmbeddingEngine,
        dense_parameters as dense_parameters,
    )
    from recis_hybrid.features import Feature as Feature, FeatureEngine as FeatureEngine
    from recis_hybrid.pipelines import (
        Evaluate as Evaluate,
        PeriodicCheckpoint as PeriodicCheckpoint,
        SaveCheckpoint as SaveCheckpoint,
        TorchStep as TorchStep,
        Train as Train,
        Trainer as Trainer,
    )
    from recis_hybrid.ragged import Batch as Batch, RaggedTensor as RaggedTensor
    from recis_hybrid.saver import Saver as Saver

    __version__: str

_PACKAGES = (
    "bridge",
    "columnio",
    "embedding",
    "features",
    "metrics",
    "optim",
    "pipelines",
    "publish",
    "ragged",
    "saver",
    "serving",
    "towers",
)
_NAMES = {
    "ColumnDataset": "columnio",
    "EmbeddingConfig": "embedding",
    "EmbeddingEngine": "embedding",
    "dense_parameters": "embedding",
    "Feature": "features",
    "FeatureEngine": "features",
    "Evaluate": "pipelines",
    "PeriodicCheckpoint": "pipelines",
    "SaveCheckpoint": "pipelines",
    "TorchStep": "pipelines",
    "Train": "pipelines",
    "Trainer": "pipelines",
    "Batch": "ragged",
    "RaggedTensor": "ragged",
    "Saver": "saver",
}


# A type checker sees the names above and refuses others.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        value: object
        if name in _NAMES:
            value = getattr(importlib.import_module(f"recis_hybrid.{_NAMES[name]}"), name)
        elif name in _PACKAGES:
            value = importlib.import_module(f"recis_hybrid.{name}")
        elif name == "__version__":
            value = importlib.import_module("importlib.metadata").version("recis_hybrid")
        else:
            raise AttributeError(f"module 'recis_hybrid' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_PACKAGES, "__version__"})
