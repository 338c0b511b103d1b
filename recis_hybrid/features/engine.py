"""FeatureEngine: computes all features of a batch."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from recis_hybrid import ops
from recis_hybrid.features.feature import Feature
from recis_hybrid.features.op import Column, Elementwise, Form
from recis_hybrid.features.program.lowering import (
    CustomCall,
    ProgramCall,
    Segment,
    ShapesCall,
    link,
    native_message,
    run_alone,
)
from recis_hybrid.features.program.plan import Plan, compile_plan
from recis_hybrid.features.program.reader_split import split_features
from recis_hybrid.ragged import Batch, RaggedTensor, arrays, checks

_Known: TypeAlias = "tuple[tuple[int, Form], ...]"

# Indices of the forms that engines of this process have seen, which name their segments, and the lock for both. All
# engines share the indices: a compiled function that looks up a segment by name finds none in an engine that has not
# seen the form, and is traced again. If each engine numbered its forms, it could have the segment of another form under
# that name.
_NUMBERS: dict[_Known, int] = {}
_LINKING = threading.RLock()
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


class FeatureEngine:
    """Computes the columns that a model takes from the columns of a reader.

    The returned batch holds the features in their order, then the columns that no feature reads, unchanged: labels,
    weights, keys. Columns that features read are dropped; declare ``Feature("age")`` without operations, or list them
    in ``keep``, to keep them. Dense tensors and RaggedTensors are transformed in the same way; RaggedTensors keep their
    offsets and weights. Nothing is modified in place, and results are on the devices of their columns. Optional
    features are omitted if the batch lacks one of their columns.

    Equal operations on equal inputs are computed once, and a few native calls compute them all: one for the
    element-wise operations of all features, and one for each kind of operation that changes rows; see :meth:`explain`.
    On CUDA a call of element-wise operations is one launch, and the host does not wait for the GPU.

    Args:
        features: The features, with distinct names.
        fuse: True fuses operations. For comparison, False runs each operation separately, and ``"kind"`` makes one call
            for each kind of element-wise operation; both are slower and compute the same bits.
        parallel: Whether native calls use torch's threads; False uses only the calling thread, as readers require. With
            ``fuse=False``, calls always use torch's threads.
        keep: Columns to keep in the batch even if features read them; the batch must have them.

    Raises:
        TypeError: If an element of ``features`` is not a Feature, or ``keep`` is not a list of names.
        ValueError: If two features have the same name, or an operation that joins columns has only one.

    Example:
        >>> engine = FeatureEngine([
        ...     Feature("user", ops=[Hash("farm"), Mod(100)]),
        ...     Feature("user_group", ops=[Hash("farm"), Mod(10)], source="user"),
        ... ])
        >>> batch = {"user": RaggedTensor.from_strings(["ann", "bob"]), "label": torch.tensor([0.0, 1.0])}
        >>> engine(batch)
        {'user': tensor([16, 13]), 'user_group': tensor([6, 3]), 'label': tensor([0., 1.])}
        >>> engine
        FeatureEngine(features=2, operations=3, fused=3
          user: 'user' -> hash[farm] -> mod[100]
          user_group: 'user' -> hash[farm] -> mod[10]
        )
        >>> engine.explain(batch)
        features: 2, columns read: 1, operations: 3 (and 1 equal to one of them)
          %0 = column 'user'
          %1 = hash[farm] %0
          %2 = mod[100] %1                          -> 'user'
          %3 = mod[10] %1                           -> 'user_group'
          all other columns pass through
        native calls: 1
          element-wise, 3 operations: %1 %2 %3
    """

    def __init__(
        self,
        features: Sequence[Feature],
        *,
        fuse: bool | Literal["kind"] = True,
        parallel: bool = True,
        keep: Sequence[str] = (),
    ) -> None:
        self._features = tuple(features)
        if isinstance(keep, str) or not all(isinstance(name, str) for name in keep):
            raise TypeError(f"FeatureEngine: keep must be a list of names of columns, got {keep!r}; write keep=[...]")
        self._fuse, self._parallel, self._keep = fuse, parallel, tuple(keep)
        self._plan = compile_plan(self._features)
        self._names = list(self._plan.columns)
        self._read = {source for instruction in self._plan.instructions for source in instruction.sources}
        self._segments: dict[_Known, str] = {}
        optional = [feature for feature in self._features if feature.optional]
        self._may_lack = tuple(dict.fromkeys(column for feature in optional for column in feature.columns))
        self._dropped: frozenset[str] = frozenset()
        self._without: dict[tuple[str, ...], str] = {}

    @property
    def features(self) -> tuple[Feature, ...]:
        """The features, as declared."""
        return self._features

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a batch must have."""
        return tuple(self._names)

    @property
    def plan(self) -> Plan:
        """The operations of all features, in the order in which they run."""
        return self._plan

    def explain(self, batch: Mapping[str, Tensor | RaggedTensor] | None = None) -> None:
        """Print the plan, with a line for each column and operation; ``str(engine.plan)`` is the same text.

        Args:
            batch: A batch; the native calls for columns of its forms are printed, too.
        """
        if batch is not None and self._may_lack and (absent := self._absent(batch)):
            getattr(self, self._lacking(absent)).explain(batch)
            return
        print(self._plan)
        if batch is None:
            return
        registers = self._columns(batch)
        lines: list[str] = []
        if self._fuse:
            while (segment := self._next(registers)) is not None:
                segment.run(registers)
                lines += [_call_line(call) for call in segment.calls]
        else:
            first = len(self._names)
            lines = [f"{line.op}: %{register}" for register, line in enumerate(self._plan.instructions, first)]
        print("\n".join([f"native calls: {len(lines)}", *[f"  {line}" for line in lines]]))

    def reading_part(self) -> FeatureEngine:
        """Return an engine for the features that a reader may compute in its threads.

        These are the features whose operations all come with the package or have ``in_reader = True``. Pass the engine
        to the reader (``ColumnDataset(..., transforms=engine.reading_part())``), and the reader's batches to
        :meth:`remaining_part`; together they compute the same features. The engine keeps the columns that the remaining
        part reads, and runs only in the calling thread.
        """
        reading, _, keep = split_features(self._features)
        columns = list(dict.fromkeys([*keep, *self._keep]))
        # Columns kept for optional features may be missing, too.
        return _remake(reading, self._fuse, False, columns, self._may_lack)

    def remaining_part(self) -> FeatureEngine:
        """Return an engine for the features that :meth:`reading_part` omits; it returns all features in their order."""
        _, remaining, _ = split_features(self._features)
        return _remake(remaining, self._fuse, self._parallel, self._keep, self._may_lack)

    def check(self) -> None:
        """Raise if element-wise operations refused a value of the last batch on a GPU; waits for the GPU.

        They refuse NaN, numbers without a logarithm or outside the range of int64, invalid offsets of strings, and
        values that are not in a vocabulary. Operations that change rows record nothing on a GPU: a row that they refuse
        becomes empty, and :class:`ToDense` truncates it. On the CPU, calling the engine raises in both cases, and there
        is nothing to check.

        Raises:
            ValueError: If a value was refused; the message names the feature or, with ``fuse=False``, the operator.
        """
        for name in list(self._without.values()):
            getattr(self, name).check()
        for name in list(self._segments.values()):
            for call in getattr(self, name).calls:
                if isinstance(call, ProgramCall):
                    call.check()
        try:
            ops.faults.check()
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def __call__(self, batch: Mapping[str, Tensor | RaggedTensor]) -> Batch:
        """Return the features of a batch.

        Args:
            batch: Columns by name, at least those in ``columns``; unchanged. Columns that features read may also be
                arrays of numpy, pandas, JAX and others, or lists of numbers (see :class:`EmbeddingEngine`).

        Returns:
            The features, then the columns that no feature reads.

        Raises:
            TypeError: If a column has a type that its operations do not take.
            ValueError: If a column is missing, a feature has the name of a column that no feature reads, or an
                operation refuses a value.
        """
        if self._may_lack and (absent := self._absent(batch)):
            features: Batch = getattr(self, self._lacking(absent))(batch)
            return features
        registers = self._columns(batch)
        if torch.compiler.is_compiling():
            self._run(registers)
        else:
            try:
                self._run(registers)
            except RuntimeError as error:
                message = native_message(error)
                if message.startswith("feature "):
                    raise ValueError(message) from error
                raise
        features = {}
        for name, register in self._plan.outputs.items():
            unchanged = register < len(self._names)
            same = unchanged and isinstance(batch[self._names[register]], Tensor | RaggedTensor)
            features[name] = batch[self._names[register]] if same else registers[register].pack()
        for name in self._keep:
            if name not in batch and name not in self._may_lack:
                raise ValueError(
                    f"FeatureEngine: keep lists {name!r}, but {_no_column(batch, name)}. Remove it from keep="
                )
        for name, column in batch.items():
            if (name not in self._plan.columns and name not in self._dropped) or name in self._keep:
                if name in features:
                    why, remedy = "no feature reads", "remove the column from the batch"
                    if name in self._keep:
                        why, remedy = "keep= keeps", "remove it from keep="
                    raise ValueError(
                        f"feature {name!r}: the batch has a column of the same name, which {why}; rename one of the "
                        f"two, or {remedy}"
                    )
                features[name] = column
        return features

    def __repr__(self) -> str:
        operations = [instruction.op for instruction in self._plan.instructions]
        fused = sum(isinstance(op, Elementwise) for op in operations) if self._fuse else 0
        head = f"FeatureEngine(features={len(self._features)}, operations={len(operations)}, fused={fused}"
        lines = [f"  {name}: {self._plan.describe(register)}" for name, register in self._plan.outputs.items()]
        return "\n".join([head, *lines, ")"])

    def __reduce__(self) -> tuple[Any, ...]:
        # Kernels may hold functions and device memory, which cannot be pickled; the plan is compiled again.
        return _remake, (self._features, self._fuse, self._parallel, self._keep, self._may_lack)

    def _absent(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the columns of optional features that a batch lacks."""
        return tuple([name for name in self._may_lack if name not in batch])

    # A constant for tracing, like the result of _link.
    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
    def _lacking(self, absent: tuple[str, ...]) -> str:
        """Return the attribute name of an engine for the features that do not need the absent columns."""
        if absent not in self._without:
            with _LINKING:
                remaining = [one for one in self._features if not (one.optional and set(absent) & set(one.columns))]
                keep = [name for name in self._keep if name not in absent]
                engine = FeatureEngine(remaining, fuse=self._fuse, parallel=self._parallel, keep=keep)
                engine._dropped = self._dropped | self._plan.columns.keys()
                name = f"_without_{'_'.join(map(str, [self._may_lack.index(column) for column in absent]))}"
                setattr(self, name, engine)
                self._without[absent] = name
        return self._without[absent]

    def _run(self, registers: dict[int, Column]) -> None:
        if not self._fuse:
            self._run_one_by_one(registers)
            return
        while (segment := self._next(registers)) is not None:
            segment.run(registers)

    def _next(self, registers: dict[int, Column]) -> Segment | None:
        """Return the native calls that can run next, None if all features are computed."""
        if all(register in registers for register in self._plan.outputs.values()):
            return None
        attribute = self._link(tuple((register, Form.of(column)) for register, column in registers.items()))
        segment: Segment = getattr(self, attribute)
        return segment

    # A trace must not follow the construction of a segment. It treats the returned name as a constant and reads the
    # attribute, so that it knows where the segment is stored.
    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
    def _link(self, known: _Known) -> str:
        if known not in self._segments:
            with _LINKING:
                if known not in self._segments:
                    name = f"_segment_{_NUMBERS.setdefault(known, len(_NUMBERS))}"
                    setattr(self, name, self._segment(known))
                    self._segments[known] = name
        return self._segments[known]

    def _segment(self, known: _Known) -> Segment:
        return link(self._plan, dict(known), parallel=self._parallel, grouped=self._fuse == "kind")

    def _run_one_by_one(self, registers: dict[int, Column]) -> None:
        for register, instruction in enumerate(self._plan.instructions, len(self._names)):
            registers[register] = run_alone(instruction, [registers[source] for source in instruction.sources])

    def _columns(self, batch: Mapping[str, Tensor | RaggedTensor]) -> dict[int, Column]:
        columns = {register: Column.of(self._column(batch, name)) for register, name in enumerate(self._names)}
        if not torch.compiler.is_compiling():
            self._check_columns(columns)
            self._check_offsets(columns)
        return columns

    def _check_columns(self, columns: dict[int, Column]) -> None:
        rows, first = -1, ""
        for register, (values, offsets, _, outer) in columns.items():
            if values.requires_grad and register in self._read and torch.is_grad_enabled():
                raise TypeError(
                    f"{self._where(register)}: the column requires a gradient, which operations do not propagate; pass "
                    f"column.detach()"
                )
            if offsets is not None:
                mine = (outer[0] if outer else offsets).shape[0] - 1
            elif values.dim() == 0:
                continue  # the operation raises
            else:
                mine = values.shape[0]
            if rows < 0:
                rows, first = mine, self._names[register]
            elif mine != rows:
                raise ValueError(
                    f"{self._where(register)}: it has {mine} rows and column {first!r} has {rows} rows; all columns of "
                    f"a batch must have the same number of rows"
                )

    def _check_offsets(self, columns: dict[int, Column]) -> None:
        """Raise if offsets were overwritten. Those on a GPU are not checked, because the host would have to wait."""
        offsets: list[Tensor] = []
        totals: list[int] = []
        owners: list[int] = []
        for register, (values, innermost, _, outer) in columns.items():
            # A tensor of another class (fake, functional) may have no content.
            if innermost is None or not innermost.is_cpu or type(innermost) is not Tensor:
                continue
            levels = [*outer, innermost]
            offsets += [level if level.is_contiguous() else level.contiguous() for level in levels]
            totals += [below.shape[0] - 1 for below in levels[1:]] + [values.shape[0]]
            owners += [register] * len(levels)
        if not offsets or (bad := ops.ragged.first_bad_offsets(offsets, totals)) < 0:
            return
        values, innermost, _, outer = columns[owners[bad]]
        assert innermost is not None
        try:
            checks.check_content(values.shape[0], innermost, outer)
        except ValueError as error:
            raise ValueError(
                f"{self._where(owners[bad])}: {error}. They were modified after the RaggedTensor checked them; build "
                f"a new RaggedTensor instead of writing to the offsets of a column, and move results of a GPU with "
                f"to('cpu'), without non_blocking"
            ) from error

    def _where(self, register: int) -> str:
        name = self._names[register]
        return f"feature {self._plan.columns[name][0]!r}, column {name!r}"

    def _column(self, batch: Mapping[str, Tensor | RaggedTensor], name: str) -> Tensor | RaggedTensor:
        column = batch.get(name)
        if isinstance(column, Tensor | RaggedTensor) and column.dtype not in _UNSIGNED:
            return column
        where = f"feature {self._plan.columns[name][0]!r}"
        if name not in batch:
            raise ValueError(
                f"{where}: {_no_column(batch, name)}. Read that column, set source= to another one, or declare the "
                f"feature optional=True"
            )
        return arrays.as_column(f"{where}: column {name!r}", column)


def _no_column(batch: Mapping[str, Any], name: str) -> str:
    near = difflib.get_close_matches(name, batch, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"the batch has no column {name!r}{meant}; it has {sorted(batch)}"


def _remake(
    features: Sequence[Feature], fuse: Any, parallel: bool, keep: Sequence[str], may_lack: Sequence[str]
) -> FeatureEngine:
    engine = FeatureEngine(features, fuse=fuse, parallel=parallel, keep=keep)
    engine._may_lack = tuple(dict.fromkeys([*engine._may_lack, *may_lack]))
    return engine


def _call_line(call: ProgramCall | ShapesCall | CustomCall) -> str:
    if isinstance(call, CustomCall):
        return f"custom, {call.instruction.op}: %{call.register}"
    if isinstance(call, ProgramCall):
        registers = [node.register for node in call.nodes]
        kind = "element-wise"
    else:
        registers, kind = call.registers, call.kind.__name__.removesuffix("Call").lower()
    return f"{kind}, {len(registers)} operations: {' '.join(f'%{register}' for register in registers)}"
