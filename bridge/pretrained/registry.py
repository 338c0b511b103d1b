"""The families of encoders, by the ``model_type`` of Hugging Face configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from recis_hybrid.bridge.pretrained.bert import bert, distilbert, roberta, xlm_roberta
from recis_hybrid.bridge.pretrained.decoder import llama, mistral, phi3, qwen2, qwen3
from recis_hybrid.bridge.pretrained.encoder import Config, Encoder
from recis_hybrid.bridge.pretrained.text import clip_text
from recis_hybrid.bridge.pretrained.vision import clip_vision, vit

FAMILIES: Final[Mapping[str, Callable[[Config], Encoder]]] = {
    "bert": bert,
    "clip_text_model": clip_text,
    "clip_vision_model": clip_vision,
    "distilbert": distilbert,
    "llama": llama,
    "mistral": mistral,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "roberta": roberta,
    "vit": vit,
    "xlm-roberta": xlm_roberta,
}
"""A function from a configuration to an encoder, by ``model_type``."""
_DECODERS: Final = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""The families with either kind of attention."""


def encoder(config: Mapping[str, Any], *, attention: Literal["causal", "full"] | None = None) -> Encoder:
    """Return the encoder of a Hugging Face configuration.

    Args:
        config: The fields of ``config.json``. Missing ones have the defaults of transformers.
        attention: In decoders, whether each token attends only to itself and earlier ones ("causal") or to all
            ("full"), as embedding models made from decoders do. By default the configuration's ``is_causal``, which is
            causal where missing. Other families have one kind.

    Returns:
        The names and shapes of its parameters, and its forward function.

    Raises:
        ValueError: if the model type is unknown, a field has an impossible value, or a field asks for something that
            would change the result and is not implemented: an activation, a kind of attention or of positions,
            quantized weights; or if ``attention`` is not one of the family's kinds.
    """
    name = config.get("model_type")
    if name == "clip":
        raise ValueError("encoder 'clip': has two encoders; pass its text_config or its vision_config")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(
            f"encoder: model_type {name!r} is not implemented in JAX, only {', '.join(sorted(FAMILIES))}; use "
            "transformers' own module, in torch"
        )
    if attention is not None:
        if name not in _DECODERS or attention not in ("causal", "full"):
            raise ValueError(
                f"encoder {name!r}: attention must be omitted, or 'causal' or 'full' for {', '.join(_DECODERS)}; got "
                f"{attention!r}"
            )
        config = {**config, "is_causal": attention == "causal"}
    fields = Config(config)
    fields.require(
        is_decoder=False, is_encoder_decoder=False, add_cross_attention=False, pruned_heads={}, quantization_config=None
    )
    return family(fields)
