"""Checks that every parameter of a step has exactly one optimizer or is frozen explicitly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from recis_hybrid.embedding import Anchor

_SHOWN = 6


def named_parameters(modules: Iterable[tuple[str, nn.Module | None]]) -> dict[str, nn.Parameter]:
    """Return the parameters of several modules by name, each once, without the names of wrappers.

    Args:
        modules: Prefix and module; None for one that there is not.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules:
        for name, parameter in [] if module is None else module.named_parameters():
            plain = ".".join(part for part in name.split(".") if part not in ("_orig_mod", "_fsdp_wrapped_module"))
            found.setdefault(id(parameter), (prefix + plain.removeprefix("module."), parameter))
    return dict(found.values())


def held_by(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the parameters that an optimizer updates."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def refuse_untrained(
    parameters: Mapping[str, nn.Parameter], optimizers: Mapping[str, torch.optim.Optimizer], frozen: set[int]
) -> None:
    """Check that every parameter has exactly one optimizer or is frozen.

    Args:
        parameters: All that the step could train, by name.
        optimizers: By name.
        frozen: ``id()`` of the parameters that the step leaves as they are, whether they take gradients or not.

    Raises:
        ValueError: A parameter that takes gradients is in no optimizer, or one is in several, or an optimizer has one
            that is not among them, or one that is frozen.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    counts = Counter(id(p) for optimizer in optimizers.values() for p in held_by(optimizer))
    twice = [p for p in parameters.values() if counts[id(p)] > 1]
    if twice:
        raise ValueError(
            f"TorchStep: more than one optimizer has {_listed(parameters, twice)}, which would be updated by each of "
            f"them in every step; leave them in one"
        )
    both = [p for p in parameters.values() if id(p) in frozen and counts[id(p)]]
    if both:
        raise ValueError(
            f"TorchStep: freeze has {_listed(parameters, both)}, which an optimizer has, too; leave them out of one"
        )
    foreign = {
        name: strangers
        for name, optimizer in optimizers.items()
        if (strangers := [p for p in held_by(optimizer) if id(p) not in names])
    }
    missing = [p for p in parameters.values() if p.requires_grad and id(p) not in frozen and not counts[id(p)]]
    if missing:
        found = ", ".join(f"{name!r} has {len(found)}" for name, found in foreign.items())
        also = f". Of parameters that are not the model's {found}: {_REBUILD}" if foreign else ""
        raise ValueError(f"TorchStep: no optimizer has {_listed(parameters, missing)}; {_remedy(missing)}{also}")
    for name, strangers in foreign.items():
        tables = [m.name for p in strangers if isinstance(p, Anchor) for m in p.table.members]
        what = f"the tables {_shown(tables)}" if tables else f"{len(strangers)} parameters"
        raise ValueError(
            f"TorchStep: the optimizer {name!r} has {what} that are not in the model, which would be trained and not "
            f"saved: {_REBUILD}, and keep whatever it trains in the model, as self.engine = engine, or in a loss that "
            f"is a torch.nn.Module"
        )


_REBUILD = "build each step's optimizers over its own model, after it was wrapped or copied"


def _remedy(missing: Sequence[nn.Parameter]) -> str:
    tables = any(isinstance(p, Anchor) for p in missing)
    dense = any(not isinstance(p, Anchor) for p in missing)
    give, freeze = [], []
    if tables:
        give.append("recis_hybrid.optim.Adam(engine.parameters())")
        freeze.append("EmbeddingConfig(trainable=False)")
    if dense:
        give.append("torch.optim.Adam(embedding.dense_parameters(model))")
        freeze.append("module.requires_grad_(False)")
    return (
        f"add an optimizer, as {' and '.join(give)}, or say that they are frozen, by {' and '.join(freeze)}, or "
        f"TorchStep(freeze=[module]) where another step trains them"
    )


def _listed(parameters: Mapping[str, nn.Parameter], some: Sequence[nn.Parameter]) -> str:
    names = {id(parameter): name for name, parameter in parameters.items()}
    tables = [member.name for p in some if isinstance(p, Anchor) for member in p.table.members]
    dense = [names[id(p)] for p in some if not isinstance(p, Anchor)]
    said = [f"the tables {_shown(tables)}"] if tables else []
    return " and ".join([*said, *([f"the parameters {_shown(dense)}"] if dense else [])])


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{list(names[:_SHOWN])}{more}"
