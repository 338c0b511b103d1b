"""Pretrained models in torch, as modules of transformers. :mod:`recis_hybrid.towers._in_jax` has the same functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.towers.files import INSTALL, PARTS, PretrainedFiles, ReadWeights

ALIGNMENT = 64
"""Alignment in bytes that JAX requires to share memory."""
_BUFFERS = ("position_ids", "token_type_ids", "inv_freq", "mask_token")
_POSITIONS = ("position_embeddings", "position_embedding")
_LISTED = 5


def load(files: PretrainedFiles, dtype: torch.dtype, pooled: bool, classes: object = None) -> nn.Module:
    """Build the module of transformers, and read its weights into memory that JAX can share.

    Args:
        files: The files.
        dtype: Dtype of the parameters.
        pooled: Whether the output is the model's own pooled one.
        classes: Ignored; torch needs no padding.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the weights do not fit the configuration, or transformers does not know the model.
    """
    try:
        from transformers import CONFIG_MAPPING, AutoModel
    except ModuleNotFoundError as error:
        raise ImportError(f"hf_tower: framework='torch' requires {error.name!r}; {INSTALL}") from error
    model_type = files.config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{files.folder}: transformers does not know the model_type {model_type!r}; upgrade transformers"
        )
    if not files.shapes:  # reading them names a damaged file, which transformers would not
        raise ValueError(f"{files.folder}: the weights have no tensors; download them again")
    with _quiet():
        model, found = AutoModel.from_pretrained(
            files.folder,
            config=CONFIG_MAPPING[model_type].from_dict(dict(files.config)),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # checked below, by name
            output_loading_info=True,
        )
    _check_loaded(model, found, str(files.folder))
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # of decoders, for generating text
    model.weight_files = ReadWeights(files, _names_in_files(model, files, dtype), dtype)
    if not pooled:
        freeze_pooler(model)
    return share(model)


def share(model: nn.Module, config: object = None, pooled: bool = False, classes: object = None) -> nn.Module:
    """Return a module of transformers, after moving its parameters to memory that JAX can share.

    Args:
        model: The module, or a larger one that contains it.
        config: Ignored; the module has its own.
        pooled: Ignored; the module has both outputs.
        classes: Ignored; torch needs no padding.
    """
    model = getattr(model, "base_model", model)
    align(model.parameters())
    return model


def run(model: nn.Module, inputs: Mapping[str, Tensor], pooled: bool) -> Tensor:
    """Compute the model.

    Args:
        model: The result of :func:`load`.
        inputs: The inputs by name.
        pooled: Whether to return the model's own pooled output.

    Returns:
        The hidden states after the last layer, ``[B, T, D]``, or the pooled output, ``[B, P]``.

    Raises:
        ValueError: If the model has no such output.
    """
    first = next(iter(inputs.values()))
    if not len(first):
        # A rank that has no rows left. The modules of transformers cannot reshape tensors without elements.
        return run(model, {next(iter(inputs)): first.new_zeros(1, *first.shape[1:])}, pooled)[:0]
    output: Any = model(**inputs)
    found = output.get("pooler_output" if pooled else "last_hidden_state")
    if found is None:
        raise no_output(type(model).__name__, pooled)
    return found  # type: ignore[no-any-return]


def describe(model: nn.Module) -> tuple[str, int | None]:
    """Return the name of the model's first input, and the largest number of tokens per row, None for no limit."""
    name = str(getattr(model, "main_input_name", "input_ids"))
    longest = None
    for path, module in model.named_modules():
        if name == "input_ids" and path.endswith(_POSITIONS) and isinstance(module, nn.Embedding):
            # With a padding index, positions are counted from it.
            longest = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return name, longest


def no_output(name: str, pooled: bool) -> ValueError:
    """Return the error for a model without pooled output, or without hidden states."""
    if pooled:
        return ValueError(f"HfTower: the model, {name}, has no pooled output; choose another pool")
    return ValueError(f"HfTower: the model, {name}, has no hidden states; use an encoder or a decoder")


def recompute(model: nn.Module) -> nn.Module:
    """Return the model, which in train mode recomputes each layer in backward instead of saving its activations."""
    found: Any = model
    # The reentrant kind would need inputs that require gradients.
    # The second name is that of earlier versions of transformers.
    enable = getattr(found, "activation_checkpointing_enable", None) or found.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return model


def adapt(
    model: nn.Module,
    scaling: Mapping[str, float],
    ranks: Mapping[str, int],
    dropout: float,
    parameters: Mapping[str, nn.Parameter],
) -> nn.Module:
    """Add low-rank adapters to linear layers, in place, with peft.

    Args:
        model: The model.
        scaling: The factor of each adapter's output, by the path of the layer.
        ranks: The rank of each adapter.
        dropout: Dropout rate of the adapters' inputs.
        parameters: The adapters' parameters by the names of :func:`adapted_name`.

    Raises:
        ImportError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ImportError(
            f"LoRA with framework='torch' requires {error.name!r}; run `pip install recis_hybrid[lora]`"
        ) from error
    patterns = {re.escape(path): rank for path, rank in ranks.items()}
    alphas = {re.escape(path): scaling[path] * rank for path, rank in ranks.items()}
    config = LoraConfig(target_modules=list(scaling), lora_dropout=dropout, rank_pattern=patterns, alpha_pattern=alphas)
    model = inject_adapter_in_model(config, model)
    for name, parameter in parameters.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, parameter)
    return model


def adapted_name(name: str, adapted: Iterable[str]) -> str:
    """Return the name of a parameter of the base model after its layer was adapted."""
    path, _, last = name.rpartition(".")
    return f"{path}.base_layer.{last}" if path in adapted else name


def align(parameters: Iterable[nn.Parameter]) -> None:
    """Move parameters to contiguous memory of torch's allocator, unless JAX can share theirs.

    Those of memory-mapped files are rarely aligned, and each call would copy them.
    """
    for parameter in parameters:
        if not parameter.is_contiguous() or parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def freeze_pooler(model: nn.Module) -> None:
    """Exclude the parameters that affect the pooled output, but not the hidden states, from training."""
    for name, parameter in model.named_parameters():
        if name.startswith(("pooler.", "post_layernorm.")):
            parameter.requires_grad_(False)


def _names_in_files(model: Any, files: PretrainedFiles, dtype: torch.dtype) -> dict[str, str]:
    """Return the names that the parameters have in the files, except for those that transformers computes from several.

    Args:
        model: The module.
        files: The files that it was read from.
        dtype: Dtype of the parameters.
    """
    named = dict(model.named_parameters())
    parts = (f"{part}_model." for part in PARTS if files.config["model_type"].count(part))
    names = {
        name: prefix + name
        for prefix in ("", f"{model.base_model_prefix}.", *parts)  # of larger models
        for name in named
        if prefix + name in files.shapes
    }
    # Of some models, transformers changes the names, by rules that differ between its versions.
    return names | files.find_equal({name: each for name, each in named.items() if name not in names}, dtype)


def _check_loaded(model: Any, found: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if weights are missing, misshapen or left over, and remove a pooler that has no weights.

    Args:
        model: The module.
        found: The loading information of transformers.
        where: The folder, for messages.
    """
    mismatched = sorted(found["mismatched_keys"])
    if mismatched:
        name, shape, expected = mismatched[0]
        raise ValueError(
            f"{where}: parameter {name!r} must have shape {list(expected)} by config.json, got {list(shape)}; check "
            "that config.json and the weights belong together"
        )
    missing = sorted(found["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing) and hasattr(model, "pooler"):
        # transformers would initialize it randomly.
        model.pooler, missing = None, []
    if missing:
        raise ValueError(f"{where}: the weights lack {_some(missing)}; check that all files are present")
    prefix = f"{model.base_model_prefix}."
    roots = {name.partition(".")[0] for name, _ in model.named_parameters()}
    unexpected = [
        name
        for name in sorted(found["unexpected_keys"])
        if name.removeprefix(prefix).partition(".")[0] in roots and not name.endswith(_BUFFERS)
    ]
    if unexpected:
        raise ValueError(
            f"{where}: config.json does not provide for these parameters of the weights: {_some(unexpected)}; check "
            "that config.json and the weights belong together"
        )


def _some(names: Sequence[str]) -> str:
    others = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + others


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bar and the report of transformers, whose content is checked instead."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
