"""Conversion of records of the log for trackers of experiments: TensorBoard, MLflow, Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recis_hybrid.pipelines.callback import Record


def figures_of(record: Record) -> dict[str, float]:
    """Return the numbers of a record by tag: ``train/loss``, ``eval/auc``.

    Args:
        record: A record of the log.

    Returns:
        All numbers but step and seconds. Names without a stage get the event in front.
    """
    return {
        name if "/" in name else f"{record['event']}/{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and name not in ("step", "seconds")
    }


def digest_of(record: Record) -> str | None:
    """Return the digest of the checkpoint that a record reports as complete or loaded; None for other records."""
    return record["digest"] if record["event"] in ("saved", "loaded") else None


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested configuration by path, such as ``train.epochs``."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            values |= flattened(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
