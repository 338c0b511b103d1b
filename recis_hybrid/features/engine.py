"""FeatureEngine: runs the plan of all features on a batch."""

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
    OwnCall,
    ProgramCall,
    Segment,
    ShapesCall,
    link,
    run_alone,
    said_by_native,
)
from recis_hybrid.features.program.plan import Plan, compile_plan
from recis_hybrid.features.program.reader_split import split_features
from recis_hybrid.ragged import Batch, RaggedTensor, arrays, checks

_Known: TypeAlias = "tuple[tuple[int, Form], ...]"

# Numbers of the forms that any engine of the process has met, and the lock under which they are given out and segments
# made. They are the names of segments: a compiled function that reads an engine's segment by its name then finds none
# in another engine that has not seen the form, and is traced anew, where a count of each engine's own would find that
# of another form.
_NUMBERS: dict[_Known, int] = {}
_LINKING = threading.RLock()
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


class FeatureEngine:
    """Makes the columns that a model takes of the columns that a reader gives.

    The batch it returns holds the declared features, in their order, and then every column of the input that no
    feature reads, untouched: labels, weights, keys. A column that is read is given up for what was made of it; to have
    it as well, declare it without operations (``Feature("age")``). Dense tensors and RaggedTensors are transformed
    alike, the latter keeping offsets and weights. Nothing is changed in place; a result lies on the device of the
    column that it comes from. An optional feature is left out where the batch lacks a column of it.

    Equal operations on equal inputs are computed once, whoever needs them, and few native calls compute all of them:
    the element-wise operations of all features are one, and those that change rows are one for each kind;
    :meth:`explain` shows it. On CUDA a call of element-wise operations is one launch, and nothing waits for the GPU.

    Args:
        features: The features to make, with names that differ.
        fuse: False runs each operation on its own, and ``"kind"`` makes a call of each kind of element-wise operation
            in place of one of all of them. Both give the same bits more slowly: to compare with.
        parallel: Whether native calls use torch's threads; False keeps to the thread that calls, as in a reader. The
            calls of ``fuse=False`` use them in any case.
        keep: Columns that the batch keeps although features read them; each must be there.

    Raises:
        TypeError: If one of the features is none, or ``keep`` no list of names.
        ValueError: If two have the same name, or an operation that joins columns has only one.

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
          all columns that are not read pass through
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
        self._given_up: frozenset[str] = frozenset()
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
        """The program that the features were compiled to."""
        return self._plan

    def explain(self, batch: Mapping[str, Tensor | RaggedTensor] | None = None) -> None:
        """Print the plan, a line for each column and operation; ``str(engine.plan)`` is the same text.

        Args:
            batch: Columns of the forms that the engine is to take: then the native calls are printed, too.
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
        """Return the engine of the features that a reader may make in its threads.

        These are the features whose operations all say so: those that come with the package, and those of one's own
        that have ``in_reader = True``. Hand it to the reader (``ColumnDataset(..., transforms=engine.reading_part())``)
        and give what the reader delivers to :meth:`remaining_part`; both together make what the whole engine makes. It
        keeps the columns that the remaining part reads, and runs in the thread that calls it alone.
        """
        reading, _, keep = split_features(self._features)
        kept = list(dict.fromkeys([*keep, *self._keep]))
        # A column that it hands on to an optional feature may be lacking, too.
        return _remake(reading, self._fuse, False, kept, self._may_lack)

    def remaining_part(self) -> FeatureEngine:
        """Return the engine of what :meth:`reading_part` leaves to be made; it gives the features in their order."""
        _, remaining, _ = split_features(self._features)
        return _remake(remaining, self._fuse, self._parallel, self._keep, self._may_lack)

    def check(self) -> None:
        """Raise for what element-wise operations have refused of the last batch on a GPU; waits for it.

        That is NaN, wrong offsets of strings, and what is not in a vocabulary. Operations that change rows note nothing
        on a GPU: a row that they refuse becomes an empty one, and :class:`ToDense` cuts it. On the CPU the call itself
        raises for both, and there is nothing to check.

        Raises:
            ValueError: If something was refused; the message names the feature.
        """
        for name in list(self._without.values()):
            getattr(self, name).check()
        for name in list(self._segments.values()):
            for call in getattr(self, name).calls:
                if isinstance(call, ProgramCall):
                    call.check()

    def __call__(self, batch: Mapping[str, Tensor | RaggedTensor]) -> Batch:
        """Make the features of a batch.

        Args:
            batch: Columns by name, among them those of ``columns``; left as it is. Columns that features read may be
                arrays of numpy, pandas, JAX and others, too, and lists of numbers (see :class:`EmbeddingEngine`).

        Returns:
            The features, then the columns that no feature reads.

        Raises:
            TypeError: If a column is of a type that its operations do not take.
            ValueError: If a column is missing, a feature has the name of a column that no feature reads, or an
                operation refuses a value.
        """
        if self._may_lack and (absent := self._absent(batch)):
            made: Batch = getattr(self, self._lacking(absent))(batch)
            return made
        registers = self._columns(batch)
        if torch.compiler.is_compiling():
            self._run(registers)
        else:
            try:
                self._run(registers)
            except RuntimeError as error:
                said = said_by_native(error)
                if said.startswith("feature "):
                    raise ValueError(said) from error
                raise
        features: Batch = {}
        for name, register in self._plan.outputs.items():
            as_it_was = register < len(self._names)
            as_given = as_it_was and isinstance(batch[self._names[register]], Tensor | RaggedTensor)
            features[name] = batch[self._names[register]] if as_given else registers[register].pack()
        for name in self._keep:
            if name not in batch and name not in self._may_lack:
                raise ValueError(
                    f"FeatureEngine: keep names {name!r}, but {_has_not(batch, name)}. Take it out of keep="
                )
        for name, column in batch.items():
            if (name not in self._plan.columns and name not in self._given_up) or name in self._keep:
                if name in features:
                    why, remedy = "no feature reads", "take the column out of the batch"
                    if name in self._keep:
                        why, remedy = "keep= keeps", "take it out of keep="
                    raise ValueError(
                        f"feature {name!r}: the batch has a column of that name too, which {why}; rename one of the "
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
        # Kernels may hold functions and device memory, which cannot travel; the plan is made anew where it arrives.
        return _remake, (self._features, self._fuse, self._parallel, self._keep, self._may_lack)

    def _absent(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the columns of optional features that a batch lacks."""
        return tuple([name for name in self._may_lack if name not in batch])

    # As _link, for a trace.
    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
    def _lacking(self, absent: tuple[str, ...]) -> str:
        """Create the engine of the features that need none of some columns; returns its attribute name."""
        if absent not in self._without:
            with _LINKING:
                left = [one for one in self._features if not (one.optional and set(absent) & set(one.columns))]
                keep = [name for name in self._keep if name not in absent]
                engine = FeatureEngine(left, fuse=self._fuse, parallel=self._parallel, keep=keep)
                engine._given_up = self._given_up | self._plan.columns.keys()
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
        """Return the native calls for what can be made next, None where all is."""
        if all(register in registers for register in self._plan.outputs.values()):
            return None
        attribute = self._link(tuple((register, Form.of(column)) for register, column in registers.items()))
        segment: Segment = getattr(self, attribute)
        return segment

    # A trace must not follow how a segment is made. It takes what is returned here for a constant, and reads the
    # attribute of that name afterwards, so that the segment itself is an object that it knows where to find.
    @torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
    def _link(self, known: _Known) -> str:
        if known not in self._segments:
            with _LINKING:
                if known not in self._segments:
                    name = f"_segment_{_NUMBERS.setdefault(known, len(_NUMBERS))}"
                    setattr(self, name, self._made(known))
                    self._segments[known] = name
        return self._segments[known]

    def _made(self, known: _Known) -> Segment:
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
                    f"{self._where(register)}: it requires a gradient, which operations do not pass on; hand over its "
                    f".detach()"
                )
            if offsets is not None:
                mine = (outer[0] if outer else offsets).shape[0] - 1
            elif values.dim() == 0:
                continue  # an operation will say so
            else:
                mine = values.shape[0]
            if rows < 0:
                rows, first = mine, self._names[register]
            elif mine != rows:
                raise ValueError(
                    f"{self._where(register)}: it has {mine} rows and column {first!r} has {rows} rows; a batch has "
                    f"one number of them"
                )

    def _check_offsets(self, columns: dict[int, Column]) -> None:
        """Raise for offsets that are none any more; to look at a GPU's would mean to wait for it."""
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
                f"{self._where(owners[bad])}: {error}. It was right when it was made: do not write to offsets that a "
                f"column has, but make a new RaggedTensor; bring one that a GPU has shortened by to('cpu') without "
                f"non_blocking"
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
                f"{where}: {_has_not(batch, name)}. Have the reader give that column, set source= to the one to read, "
                f"or declare the feature optional=True"
            )
        return arrays.as_column(f"{where}: column {name!r}", column)


def _has_not(batch: Mapping[str, Any], name: str) -> str:
    near = difflib.get_close_matches(name, batch, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"the batch has no column {name!r}{meant}; it has {sorted(batch)}"


def _remake(
    features: Sequence[Feature], fuse: Any, parallel: bool, keep: Sequence[str], may_lack: Sequence[str]
) -> FeatureEngine:
    engine = FeatureEngine(features, fuse=fuse, parallel=parallel, keep=keep)
    engine._may_lack = tuple(dict.fromkeys([*engine._may_lack, *may_lack]))
    return engine


def _call_line(call: ProgramCall | ShapesCall | OwnCall) -> str:
    if isinstance(call, OwnCall):
        return f"one's own, {call.instruction.op}: %{call.register}"
    if isinstance(call, ProgramCall):
        made = [node.register for node in call.nodes]
        what = "element-wise"
    else:
        made, what = call.registers, call.kind.__name__.removesuffix("Call").lower()
    return f"{what}, {len(made)} operations: {' '.join(f'%{register}' for register in made)}"
