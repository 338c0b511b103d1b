"""Split of features between the threads of a reader and the main thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recis_hybrid.features.feature import Feature
from recis_hybrid.features.op import Compound, Elementwise, Shaping
from recis_hybrid.features.program.plan import compile_plan


def _may_run_there(op: Any) -> bool:
    if isinstance(op, Compound):
        return all(_may_run_there(part) for chain in op.expand() for part in chain)
    return isinstance(op, Elementwise | Shaping) or bool(getattr(op, "in_reader", False))


def _in_reader(feature: Feature) -> bool:
    """Return whether all operations of a feature may run in the threads of a reader."""
    sources = (source for source in feature.sources if isinstance(source, Feature))
    return all(map(_may_run_there, feature.ops)) and all(map(_in_reader, sources))


def split_features(features: Sequence[Feature]) -> tuple[list[Feature], list[Feature], list[str]]:
    """Split features into those that a reader computes and the remaining ones.

    A feature also remains if its output has the name of a column that a remaining feature reads.

    Returns:
        The features that the reader computes; all features for the remaining part, in their order, where those of the
        reader are passed through; and the columns that the reader must keep.
    """
    names = {feature.name: list(compile_plan([feature]).outputs) for feature in features}
    remaining_names = {feature.name for feature in features if not _in_reader(feature)}
    while True:
        keep = {column for feature in features if feature.name in remaining_names for column in feature.columns}
        more = {name for name, outputs in names.items() if name not in remaining_names and keep.intersection(outputs)}
        if not more:
            break
        remaining_names |= more
    reading = [feature for feature in features if feature.name not in remaining_names]

    def passed_through(feature: Feature) -> list[Feature]:
        return [Feature(name, optional=feature.optional) for name in names[feature.name]]

    remaining: list[Feature] = []
    for feature in features:
        remaining += [feature] if feature.name in remaining_names else passed_through(feature)
    return reading, remaining, sorted(keep)
