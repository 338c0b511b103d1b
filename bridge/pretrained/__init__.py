"""Encoders of Hugging Face checkpoints as pure JAX functions over the flat state dict.

:func:`encoder` reads a ``config.json`` and returns an :class:`Encoder`: the names and shapes of the parameters, and a
forward function. Everything that would change the result and is not implemented is refused by name. This package
knows neither files nor torch modules, imports nothing else of the bridge, and only ``recis_hybrid.towers`` imports it.
"""

from __future__ import annotations

from recis_hybrid.bridge.pretrained.adapters import with_adapters as with_adapters
from recis_hybrid.bridge.pretrained.encoder import Encoder as Encoder, Output as Output
from recis_hybrid.bridge.pretrained.layers import COMPUTE as COMPUTE, ONLY_LAYERS as ONLY_LAYERS
from recis_hybrid.bridge.pretrained.registry import encoder as encoder

__all__ = ["COMPUTE", "ONLY_LAYERS", "Encoder", "Output", "encoder", "with_adapters"]
