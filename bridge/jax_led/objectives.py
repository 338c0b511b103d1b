"""Objectives of a JAX-led step: losses of outputs, and scores for metrics.

Legend: B rows of a batch, K outputs per row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from recis_hybrid.validation import describe_value


@dataclass(frozen=True)
class Objective:
    """A loss and its columns."""

    where: str
    """Prefix of error messages."""
    loss: Callable[..., Any]
    """(outputs, labels) → a loss for each row, ``[B]``, or a scalar; outputs alone without labels."""
    label: str | None
    """Column of labels."""
    groups: str | None
    """Column of groups."""
    link: Callable[[Any], Any]
    """Outputs → scores ``[B]``."""
    weight: float = 1.0
    """Weight of the loss in the sum."""

    def mean_loss(self, outputs: Any, labels: Any, mask: Any) -> jax.Array:
        """Return the mean loss of a batch; for use inside jit.

        Args:
            outputs: ``[B]`` or ``[B, K]``.
            labels: As many as outputs, or ``[B]``; None: the loss takes only the outputs.
            mask: bool ``[B]``, False for padding rows; None if all rows count.

        Raises:
            ValueError: if the loss is neither a scalar nor ``[B]``, or is a scalar and there are padding rows.
        """
        if labels is not None and labels.size == outputs.size:
            labels = labels.reshape(outputs.shape).astype(outputs.dtype)
        if mask is not None:  # a NaN in a padding row would reach all gradients, even where its loss is dropped
            outputs, labels = _zeroed(outputs, mask), labels if labels is None else _zeroed(labels, mask)
        losses = self.loss(outputs) if labels is None else self.loss(outputs, labels)
        rows = outputs.shape[0]
        if losses.ndim == 0:
            if mask is not None:
                raise ValueError(
                    f"{self.where}: loss must return a loss for each row, [B], to omit padding rows, got a scalar; "
                    "remove the mean from it"
                )
            return losses if rows else jnp.zeros_like(losses)  # a mean over no rows is NaN
        if losses.shape == (rows,) or losses.shape == (rows, 1):
            losses = losses.reshape(rows)
            counted = rows if mask is None else mask.sum()
            return (losses if mask is None else jnp.where(mask, losses, 0)).sum() / jnp.maximum(counted, 1)
        raise ValueError(
            f"{self.where}: loss must return a scalar or a loss for each row, [{rows}], got {list(losses.shape)} for "
            f"outputs {list(outputs.shape)}"
        )

    def scores(self, outputs: Any) -> Any:
        """Return the scores ``[B]`` of outputs; for use inside jit."""
        scores = self.link(outputs)
        return scores[:, 0] if scores.ndim == 2 and scores.shape[1] == 1 else scores


def objectives_of(loss: Any, label: str | None, groups: str | None, link: Callable[[Any], Any]) -> dict[str, Objective]:
    """Return a step's objectives by name. A single unnamed objective has the name ``""``.

    Args:
        loss: A function; a ``pipelines.Objective`` with a function of JAX; or several by name.
        label: Column of labels, if ``loss`` is a function.
        groups: Column of groups, if ``loss`` is a function.
        link: Outputs → scores, for objectives without one.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is no objective, or one has no loss or a variable weight.
    """
    if hasattr(loss, "loss") and hasattr(loss, "weight"):
        loss = {"": loss}
    if not isinstance(loss, Mapping):
        if isinstance(loss, type) or not callable(loss):
            raise TypeError(
                f"JaxStep: loss must be a function (outputs, labels) → a loss for each row, or objectives by name, got "
                f"{describe_value(loss)}"
            )
        return {"": Objective("JaxStep", loss, label, groups, link)}
    if not loss:
        raise ValueError("JaxStep: loss must have at least one objective, got an empty mapping")
    found = {}
    for name, each in loss.items():
        where = f"JaxStep: objective {name!r}" if name else "JaxStep"
        if not hasattr(each, "loss") or not hasattr(each, "weight"):
            raise TypeError(f"{where}: must be a pipelines.Objective, got {describe_value(each)}")
        if each.loss is None:
            raise ValueError(f"{where}: must have a loss, got None; compute it from outputs of the tower")
        if callable(each.weight):
            raise ValueError(
                f"{where}: the weight must be a number, because it is a constant of the jitted call, got a function; "
                "build a step for each weight, or train with TorchStep and a JaxTower"
            )
        found[name] = Objective(where, each.loss, each.label, each.groups, each.link or link, float(each.weight))
    return found


def metrics_of(metrics: Mapping[str, Any] | None, objectives: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return metrics by objective and name.

    Args:
        metrics: By name, of which each of several objectives gets empty copies; or by objective and name.
        objectives: Names of the objectives.

    Raises:
        ValueError: if there are metrics of unknown objectives.
    """
    nested = {name: dict(value) for name, value in (metrics or {}).items() if isinstance(value, Mapping)}
    if unknown := [name for name in nested if name not in objectives]:
        raise ValueError(f"JaxStep: there are metrics of {unknown}, but the objectives are {list(objectives)}")
    if nested or not metrics:
        return nested
    if len(objectives) == 1:
        return {name: dict(metrics) for name in objectives}
    return {objective: {name: _empty(metric) for name, metric in metrics.items()} for objective in objectives}


def _empty(metric: Any) -> Any:
    result = copy.copy(metric)
    result.reset()
    return result


def _zeroed(values: Any, mask: Any) -> Any:
    """Return values with zeros in padding rows."""
    return jnp.where(mask.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
