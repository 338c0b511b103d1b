"""Step: what a pipeline does with a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from recis_hybrid.ragged import Batch


class Step(Protocol):
    """One training step. Whatever leads the program, torch or JAX, a pipeline sees only this."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Trains on a batch and returns what to watch, ``"loss"`` among it, without waiting for a device."""


class TorchStep:
    """Forward, backward and update of a torch module.

    Args:
        model: Batch → logits ``[B]``.
        loss: (logits, labels) → scalar.
        optimizers: Dense and sparse ones; each steps once a batch.
        label: The column of labels, float32 ``[B]``.
        clip_grad_norm: Largest global norm of all gradients, those of tables included; None leaves them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        label: str = "label",
        clip_grad_norm: float | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        self.optimizers = list(optimizers)
        self.label = label
        self.clip_grad_norm = clip_grad_norm

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Trains on one batch.

        Raises:
            KeyError: If the batch lacks the label column.
        """
        labels = labels_of(batch, self.label)
        self.model.train()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.loss(self.model(batch), labels)
        loss.backward()
        if self.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return {"loss": loss.detach()}


def labels_of(batch: Batch, label: str) -> Tensor:
    """Returns the label column, [B]."""
    labels = batch.get(label)
    if not isinstance(labels, Tensor):
        raise KeyError(f"the label column {label!r} must be a dense column of the batch, which has {sorted(batch)}")
    return labels
