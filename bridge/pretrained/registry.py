"""The families of encoders, by the ``model_type`` of Hugging Face configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from recis_hybrid.bridge.pretrained.encoder import Config, Encoder
from recis_hybrid.bridge.pretrained.vision import vit

FAMILIES: Final[Mapping[str, Callable[[Config], Encoder]]] = {
    "vit": vit,
}
"""A function from a configuration to an encoder, by ``model_type``."""


def encoder(config: Mapping[str, Any]) -> Encoder:
    """Return the encoder of a Hugging Face configuration.

    Args:
        config: The fields of ``config.json``. Missing ones have the defaults of transformers.

    Returns:
        The names and shapes of its parameters, and its forward function.

    Raises:
        ValueError: if the model type is unknown, a field has an impossible value, or a field asks for something that
            would change the result and is not implemented: an activation, a kind of attention or of positions,
            quantized weights.
    """
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(
            f"encoder: model_type {name!r} is not implemented in JAX, only {', '.join(sorted(FAMILIES))}; use "
            "transformers' own module, in torch"
        )
    fields = Config(config)
    fields.require(
        is_decoder=False, is_encoder_decoder=False, add_cross_attention=False, pruned_heads={}, quantization_config=None
    )
    return family(fields)
