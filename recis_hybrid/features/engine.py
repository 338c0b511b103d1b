"""FeatureEngine: runs the plan of all features on a batch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import Tensor

from recis_hybrid.features.feature import Feature
from recis_hybrid.features.op import Column
from recis_hybrid.features.plan import Plan, compile_plan
from recis_hybrid.ragged import Batch, RaggedTensor


class FeatureEngine:
    """Makes the columns that a model takes of the columns that a reader gives.

    The batch it returns holds the declared features, in their order, and then every column of the input that no
    feature reads, untouched: labels, weights, keys. A column that is read is given up for what was made of it; to have
    it as well, declare it without operations (``Feature("age")``). Dense tensors and RaggedTensors are transformed
    alike, the latter keeping offsets and weights. Nothing is changed in place; a result lies on the device of the
    column that it comes from.

    Equal operations on equal inputs are computed once, whoever needs them; :meth:`explain` shows it.

    Args:
        features: The features to make, with names that differ.

    Raises:
        TypeError: If one of them is no Feature.
        ValueError: If two have the same name.

    Example:
        >>> engine = FeatureEngine([
        ...     Feature("user", ops=[Hash("farm"), Mod(100)]),
        ...     Feature("user_group", ops=[Hash("farm"), Mod(10)], source="user"),
        ... ])
        >>> engine({"user": RaggedTensor.from_strings(["ann", "bob"]), "label": torch.tensor([0.0, 1.0])})
        {'user': tensor([16, 13]), 'user_group': tensor([6, 3]), 'label': tensor([0., 1.])}
        >>> engine.explain()
        features: 2, columns read: 1, operations: 3 (and 1 equal to one of them)
          %0 = column 'user'
          %1 = hash[farm] %0
          %2 = mod[100] %1                          -> 'user'
          %3 = mod[10] %1                           -> 'user_group'
          all columns that are not read pass through
    """

    def __init__(self, features: Sequence[Feature]) -> None:
        self._features = tuple(features)
        self._plan = compile_plan(self._features)

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features, as declared."""
        return self._features

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a batch must have."""
        return tuple(self._plan.columns)

    @property
    def plan(self) -> Plan:
        """The program that the features were compiled to."""
        return self._plan

    def explain(self) -> None:
        """Prints the plan, a line for each column and operation; ``str(engine.plan)`` is the same text."""
        print(self._plan)

    def __call__(self, batch: Mapping[str, Tensor | RaggedTensor]) -> Batch:
        """Makes the features of a batch.

        Args:
            batch: Columns by name, among them those of ``columns``; left as it is.

        Returns:
            The features, then the columns that no feature reads.

        Raises:
            TypeError: If a column is of a type that its operations do not take.
            ValueError: If a column is missing, or a feature has the name of a column that no feature reads.
        """
        plan = self._plan
        registers = [Column.of(self._column(batch, name)) for name in plan.columns]
        for instruction in plan.instructions:
            try:
                registers.append(instruction.kernel(registers[instruction.source]))
            except (TypeError, ValueError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"feature {instruction.features[0]!r}, {instruction.op}: {error}") from error
            except RuntimeError as error:
                error.add_note(f"in feature {instruction.features[0]!r}, {instruction.op}")
                raise
        features: Batch = {}
        names = list(plan.columns)
        for name, register in plan.outputs.items():
            as_it_was = register < len(names)
            features[name] = batch[names[register]] if as_it_was else registers[register].pack()
        for name, column in batch.items():
            if name not in plan.columns:
                if name in features:
                    raise ValueError(
                        f"feature {name!r}: the batch has a column of that name too, which no feature reads; "
                        f"rename one of the two, or take the column out of the batch"
                    )
                features[name] = column
        return features

    def __reduce__(self) -> tuple[type[FeatureEngine], tuple[tuple[Feature, ...]]]:
        # Kernels may hold functions and device memory, which cannot travel; the plan is made anew where it arrives.
        return FeatureEngine, (self._features,)

    def _column(self, batch: Mapping[str, Tensor | RaggedTensor], name: str) -> Tensor | RaggedTensor:
        where = f"feature {self._plan.columns[name][0]!r}"
        if name not in batch:
            near = difflib.get_close_matches(name, batch, n=1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(
                f"{where}: the batch has no column {name!r}{meant}; it has {sorted(batch)}. "
                f"Have the reader give that column, or set source= to the one to read"
            )
        column = batch[name]
        if not isinstance(column, Tensor | RaggedTensor):
            raise TypeError(
                f"{where}: column {name!r} must be a Tensor or a RaggedTensor, got {type(column).__name__}; "
                f"lists of numbers become one by RaggedTensor.from_lists, strings by RaggedTensor.from_strings"
            )
        return column
