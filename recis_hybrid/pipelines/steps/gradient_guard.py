"""GradientGuard: refuses updates by gradients that are not finite, and names their origin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid import distributed
from recis_hybrid.embedding import Anchor, EmbeddingEngine
from recis_hybrid.pipelines.steps.loss_guard import non_finite_columns
from recis_hybrid.ragged import Batch

_MOST_PARAMETERS = 4
_NO_CAUSE = "Batch and rows are finite; look for a root or a logarithm of 0 or a division by 0 in model and loss"


class NonFiniteGradientError(FloatingPointError):
    """A gradient is NaN or infinite. The message names table, feature and ids, or the parameter of a tower."""


@dataclass(frozen=True, eq=False)
class _Lookup:
    engine: EmbeddingEngine
    batch: Batch
    values: Mapping[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


class GradientGuard:
    """Keeps the gradients of engines' outputs until they have been checked.

    All gradients of an update are checked together, for which the host waits for the device once.

    Args:
        engines: Engines whose lookups are watched within :meth:`watching`.
    """

    def __init__(self, engines: Sequence[EmbeddingEngine]) -> None:
        self._lookups: list[_Lookup] | None = None
        keep = torch.compiler.disable(self._keep)
        for engine in engines:
            engine.register_forward_hook(keep)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the gradients of lookups within the block."""
        self._lookups = []
        try:
            yield
        finally:
            self._lookups = None

    def _keep(self, engine: EmbeddingEngine, args: tuple[Any, ...], outputs: dict[str, Tensor]) -> None:
        if self._lookups is None:
            return
        values = {name: value for name, value in outputs.items() if name in engine.configs and value.requires_grad}
        lookup = _Lookup(engine, args[0], {name: value.detach() for name, value in values.items()})
        for name, value in values.items():
            value.register_hook(partial(_store, lookup.gradients, name))
        self._lookups.append(lookup)

    def check(
        self,
        step: int,
        loss: Tensor | None,
        parameters: Sequence[nn.Parameter],
        names: Callable[[], Mapping[str, nn.Parameter]],
        batches: Sequence[Batch],
    ) -> None:
        """Check all gradients before they are used; collective if there are several ranks.

        Args:
            step: Number of the step, for messages.
            loss: Loss of the step; None if this rank has no rows.
            parameters: Trained parameters; tables among them are left out.
            names: Returns parameters by name, for messages.
            batches: Batches of the step.

        Raises:
            NonFiniteGradientError: A gradient is not finite, on this or on another rank.
        """
        assert self._lookups is not None
        # type() instead of isinstance(), which takes twenty times as long on a Parameter.
        dense = [p for p in parameters if type(p) is not Anchor and p.grad is not None]
        gradients = [_values(p.grad) for p in dense if p.grad is not None]
        gradients += [each for lookup in self._lookups for each in lookup.gradients.values()]
        found: list[str] = []
        if not _are_finite(gradients):
            trained = {id(p) for p in dense}
            named = {name: _values(p.grad) for name, p in names().items() if id(p) in trained and p.grad is not None}
            found = [*self._features(), *_parameters(named)]
        if int(distributed.sum_over_ranks(torch.tensor(len(found)))) == 0:
            return
        by_rank = distributed.exchange([", ".join(found), self._cause(batches) if found else ""])
        several = distributed.world_size() > 1
        texts = [f"on rank {rank}, {text}" if several else text for rank, (text, _) in enumerate(by_rank) if text]
        cause = next((cause for _, cause in by_rank if cause), _NO_CAUSE)
        given = "" if loss is None else f", with a loss of {float(loss)}"
        raise NonFiniteGradientError(
            f"the gradients of step {step} are not finite{given}, and nothing was updated: {'; '.join(texts)}. {cause}"
        )

    def _features(self) -> list[str]:
        return [
            each for one in self._lookups or () for each in one.engine.describe_non_finite(one.batch, one.gradients)
        ]

    def _cause(self, batches: Sequence[Batch]) -> str:
        """Return a sentence about rows or columns that are not finite; empty if all are."""
        rows = [each for one in self._lookups or () for each in one.engine.describe_non_finite(one.batch, one.values)]
        if rows:
            return f"Rows were not finite before the step, after an earlier update or from a checkpoint: {rows[0]}"
        if columns := [fault for batch in batches for fault in non_finite_columns(batch)]:
            return f"The columns {', '.join(columns)} of the batch are not finite; fix the data"
        return ""


def _store(gradients: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    # Backward may run twice; a copy is not needed, because the gradient of an output is never written in place.
    gradients[name] = gradients[name] + gradient if name in gradients else gradient


def _values(gradient: Tensor) -> Tensor:
    """Return the numbers of a gradient: of this rank's shard under FSDP, of the stored rows if it is sparse."""
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return local.coalesce().values() if local.is_sparse else local


def _are_finite(gradients: Sequence[Tensor]) -> bool:
    if not gradients:
        return True
    # A sum is not finite if an element is not. Finite numbers whose sum overflows are found finite afterwards.
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        total = gradient.sum()
        total = total if total.dtype is torch.float32 else total.abs().float()
        by_device.setdefault(gradient.device, []).append(total)
    return all(bool(torch.stack(sums).isfinite().all()) for sums in by_device.values())


def _parameters(gradients: Mapping[str, Tensor]) -> list[str]:
    counts = {name: (int((~each.isfinite()).sum()), each.numel()) for name, each in gradients.items()}
    texts = [f"parameter {name!r} ({bad:,} of {total:,} elements)" for name, (bad, total) in counts.items() if bad]
    rest = len(texts) - _MOST_PARAMETERS
    return texts if rest <= 0 else [*texts[:_MOST_PARAMETERS], f"{rest} more parameters"]
