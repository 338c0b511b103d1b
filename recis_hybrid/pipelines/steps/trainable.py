"""Check that every parameter of a step has exactly one optimizer or is frozen explicitly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from recis_hybrid.embedding import Anchor

_MOST_NAMES = 6
"""Maximum number of names in a message."""


def named_parameters(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Parameter]:
    """Return the parameters of several modules by name, each once. Names omit wrappers.

    Args:
        modules: Pairs of a name prefix and a module.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules:
        for name, parameter in module.named_parameters():
            plain = ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module"))
            found.setdefault(id(parameter), (prefix + plain.removeprefix("module."), parameter))
    return dict(found.values())


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the parameters that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_trained(
    parameters: Mapping[str, nn.Parameter], optimizers: Mapping[str, torch.optim.Optimizer], frozen: set[int]
) -> None:
    """Check that every parameter has exactly one optimizer or is frozen.

    Args:
        parameters: All parameters that the step could train, by name.
        optimizers: The step's optimizers by name.
        frozen: ``id()`` of the parameters that the step must not change, whether they require gradients or not.

    Raises:
        ValueError: A parameter that requires gradients has no optimizer or several, or an optimizer has a parameter
            that is frozen or unknown.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    counts = Counter(id(p) for optimizer in optimizers.values() for p in parameters_of(optimizer))
    twice = [p for p in parameters.values() if counts[id(p)] > 1]
    if twice:
        raise ValueError(
            f"TorchStep: more than one optimizer has {_list(parameters, twice)}, and each step would update them "
            f"more than once; keep them in one"
        )
    both = [p for p in parameters.values() if id(p) in frozen and counts[id(p)]]
    if both:
        raise ValueError(
            f"TorchStep: both freeze and an optimizer have {_list(parameters, both)}; remove them from one of the two"
        )
    foreign = {
        name: strangers
        for name, optimizer in optimizers.items()
        if (strangers := [p for p in parameters_of(optimizer) if id(p) not in names])
    }
    missing = [p for p in parameters.values() if p.requires_grad and id(p) not in frozen and not counts[id(p)]]
    if missing:
        counted = ", ".join(f"{name!r} has {len(strangers)}" for name, strangers in foreign.items())
        also = f". Of parameters outside the model, {counted}; {_REBUILD}" if foreign else ""
        raise ValueError(f"TorchStep: no optimizer has {_list(parameters, missing)}; {_remedy(missing)}{also}")
    for name, strangers in foreign.items():
        tables = [m.name for p in strangers if isinstance(p, Anchor) for m in p.table.members]
        what = f"the tables {_first(tables)}" if tables else f"{len(strangers)} parameters"
        raise ValueError(
            f"TorchStep: the optimizer {name!r} has {what} outside the model, which would be trained but not saved; "
            f"{_REBUILD}, and keep everything it trains in the model (self.engine = engine) or in a loss that is a "
            f"torch.nn.Module"
        )


_REBUILD = "build each step's optimizers from its own model, after wrapping or copying the model"


def _remedy(missing: Sequence[nn.Parameter]) -> str:
    tables = any(isinstance(p, Anchor) for p in missing)
    dense = any(not isinstance(p, Anchor) for p in missing)
    add, freeze = [], []
    if tables:
        add.append("recis_hybrid.optim.Adam(engine.parameters())")
        freeze.append("EmbeddingConfig(trainable=False)")
    if dense:
        add.append("torch.optim.Adam(embedding.dense_parameters(model))")
        freeze.append("module.requires_grad_(False)")
    return (
        f"add an optimizer with {' and '.join(add)}, or freeze them with {' and '.join(freeze)}, or with "
        f"TorchStep(freeze=[module]) if another step trains them. An optimizer may have frozen parameters, and needs "
        f"those that a stage unfreezes"
    )


def _list(parameters: Mapping[str, nn.Parameter], some: Sequence[nn.Parameter]) -> str:
    names = {id(parameter): name for name, parameter in parameters.items()}
    tables = [member.name for p in some if isinstance(p, Anchor) for member in p.table.members]
    dense = [names[id(p)] for p in some if not isinstance(p, Anchor)]
    texts = [f"the tables {_first(tables)}"] if tables else []
    return " and ".join([*texts, *([f"the parameters {_first(dense)}"] if dense else [])])


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{list(names[:_MOST_NAMES])}{more}"
