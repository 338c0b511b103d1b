"""Stages of a training. A list of them, or a generator, is a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from recis_hybrid.columnio import Window
from recis_hybrid.embedding import Anchor, EmbeddingEngine, EvictionRule
from recis_hybrid.embedding.eviction import check_rule
from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.arguments import Trainable, check_batches, check_callable, check_parameters, parameters_in
from recis_hybrid.pipelines.steps.metrics import check_metrics
from recis_hybrid.ragged import Batch
from recis_hybrid.saver import Location
from recis_hybrid.validation import check_integer, check_type, describe_value

Source: TypeAlias = "str | Iterable[Batch]"
"""Name of a source of the trainer, which each stage continues to read; or batches, read from the start."""


class Run(Protocol):
    """Interface of a running training for stages and callbacks, implemented by :class:`Trainer`."""

    figures: dict[str, dict[str, float]]
    """Latest metrics of each evaluation, by the evaluation's name."""

    @property
    def steps_done(self) -> int:
        """Completed training steps, including those before a restart."""

    @property
    def samples(self) -> int:
        """Rows that this rank has trained on, including padding rows."""

    @property
    def engines(self) -> list[EmbeddingEngine]:
        """Engines of all steps."""

    def train(self, stage: Train) -> None:
        """Train until the stage's bound is reached."""

    def evaluate(self, stage: Evaluate) -> None:
        """Compute the stage's metrics and store them in ``figures``."""

    def evict(self, stage: Evict) -> None:
        """Evict rows by the stage's rule."""

    def count_evicted(self, rows: int) -> None:
        """Count rows that were evicted on this process, for the log."""

    def save(self, *, delta: bool = False) -> Location | None:
        """Write a checkpoint, unless the current step has one."""

    def stop(self, reason: str) -> None:
        """End the training after the current step."""

    def steps_left(self, stage: Stage) -> int | None:
        """Return the number of steps left in a training stage; None for other stages."""

    def parts(self) -> dict[str, Any]:
        """Return the parts of a checkpoint, by name."""


class Stage(Protocol):
    """One stage of a pipeline."""

    def run(self, trainer: Run) -> None:
        """Run the stage."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Trains for a number of steps, for a number of passes, or on a window.

    The default is one pass. A source without a length requires a bound or ``endless``. A pass that an earlier stage
    left unfinished is continued and counts when it ends.

    Raises:
        ValueError: A bound is less than 1, or both data and a window are passed.

    Example:
        >>> Train(max_steps=100).max_steps
        100
    """

    data: Source = "train"
    """Source of the batches."""
    max_steps: int | None = None
    """Maximum number of updates; passes repeat as needed."""
    epochs: int | None = None
    """Maximum number of passes."""
    window: Window | None = None
    """Window whose files are read once, opened by the trainer's ``open_window``."""
    endless: bool = False
    """Allow a stage that ends only when a callback stops it."""
    step: str | None = None
    """Name of one of the trainer's steps; None: the first."""
    freeze: Sequence[Trainable] = ()
    """Modules and parameters that stay fixed in this stage. Buffers, such as batch norm statistics, do not."""
    unfreeze: Sequence[Trainable] = ()
    """Modules and parameters that are trained in this stage although they are frozen otherwise, or by ``freeze``. They
    need an optimizer, which may have them before they are unfrozen."""
    transform: Callable[[Batch], Batch] | None = None
    """Applied to each batch before the step."""
    name: str = "train"
    """Name of the stage in logs."""

    def __post_init__(self) -> None:
        for bound, value in (("max_steps", self.max_steps), ("epochs", self.epochs)):
            if value is not None:
                check_integer("Train", bound, value, low=1)
        _check_types(self)
        for name in ("freeze", "unfreeze"):
            items = check_parameters("Train", name, getattr(self, name), f"{name}=[model.tower]")
            object.__setattr__(self, name, items)
        if self.window is not None and self.data != "train":
            raise ValueError("Train: data and window exclude each other, got both; pass only one")

    def run(self, trainer: Run) -> None:
        """Train; see :meth:`Trainer.train`."""
        frozen = {id(parameter): (parameter, False) for parameter in parameters_in(self.freeze)}
        # A read-only table cannot be trained.
        trained = [p for p in parameters_in(self.unfreeze) if not (isinstance(p, Anchor) and p.table.read_only)]
        changed = frozen | {id(parameter): (parameter, True) for parameter in trained}
        before = [(parameter, parameter.requires_grad) for parameter, _ in changed.values()]
        for parameter, requires_grad in changed.values():
            parameter.requires_grad_(requires_grad)
        try:
            trainer.train(self)
        finally:
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Computes metrics over all batches of a source. Tables insert no rows.

    Example:
        >>> Evaluate(name="test").name
        'test'
    """

    data: Source = "eval"
    """Source of the batches, always read from the start."""
    window: Window | None = None
    """Window of files to evaluate on, opened by the trainer's ``open_window``."""
    metrics: Mapping[str, Metric] | Mapping[str, Mapping[str, Metric]] | None = None
    """Metrics by name, for every objective; or by objective and name. None: the trainer's."""
    step: str | None = None
    """Name of one of the trainer's steps; None: the first."""
    transform: Callable[[Batch], Batch] | None = None
    """Applied to each batch before the step."""
    within: Callable[[], AbstractContextManager[None]] | None = None
    """Returns a context for the evaluation, such as :meth:`EMA.averaged`, which replaces parameters."""
    name: str = "eval"
    """Name under which the metrics are stored and logged."""

    def __post_init__(self) -> None:
        _check_types(self)
        if self.within is not None:
            check_callable("Evaluate", "within", self.within, "a function that returns a context, or None")
        if self.metrics is not None:
            check_metrics("Evaluate", self.metrics)
        if self.window is not None and self.data != "eval":
            raise ValueError("Evaluate: data and window exclude each other, got both; pass only one")

    def run(self, trainer: Run) -> None:
        """Evaluate; see :meth:`Trainer.evaluate`."""
        trainer.evaluate(self)


@dataclass(frozen=True)
class Evict:
    """Evicts the rows that a rule selects, in every trainable table, or in each table by a rule of its own.

    :class:`PeriodicEviction` does it within training stages.

    Example:
        >>> from recis_hybrid.embedding import Capacity, Unused
        >>> Evict(Unused(steps=1000)).name
        'evict'
        >>> Evict({"item": Capacity(rows=1_000_000), "user": lambda rows: rows.frequency < 2}).name
        'evict'
    """

    rule: EvictionRule | Mapping[str, EvictionRule]
    """Selects the rows, as for :meth:`EmbeddingEngine.evict`; or rules by name of the table, of whichever engine. Other
    tables then keep their rows."""
    compact: bool = False
    """Compact the tables afterwards, which frees memory."""
    name: str = "evict"
    """Name of the stage in logs."""

    def __post_init__(self) -> None:
        rules = self.rule.items() if isinstance(self.rule, Mapping) else [("", self.rule)]
        for table, rule in rules:
            check_rule(f"Evict: rule of the table {table!r}" if table else "Evict: rule", rule)

    def rule_of(self, engine: EmbeddingEngine) -> EvictionRule | Mapping[str, EvictionRule]:
        """Return the rule for all tables of an engine, or the rules of those that have one."""
        if not isinstance(self.rule, Mapping):
            return self.rule
        return {table: rule for table, rule in self.rule.items() if table in self.tables_of(engine)}

    def tables_of(self, engine: EmbeddingEngine) -> list[str]:
        """Return the names of the tables of an engine to which a rule is applied."""
        by_name = isinstance(self.rule, Mapping)
        return [
            member.name
            for table in engine.tables
            for member in table.members
            if (member.name in self.rule if by_name else not table.read_only)  # type: ignore[operator]
        ]

    def refuse_unknown(self, engines: Sequence[EmbeddingEngine]) -> None:
        """Raise ValueError if there is a rule for a table that none of the engines has."""
        if isinstance(self.rule, Mapping):
            tables = {member.name for engine in engines for plan in engine.plans for member in plan.members}
            if unknown := sorted(self.rule.keys() - tables):
                raise ValueError(f"Evict: there are no tables {unknown}; the tables are {sorted(tables)}")

    def run(self, trainer: Run) -> None:
        """Evict; see :meth:`Trainer.evict`."""
        trainer.evict(self)


@dataclass(frozen=True)
class SaveCheckpoint:
    """Writes a checkpoint, unless the current step has one.

    Example:
        >>> SaveCheckpoint().name
        'save'
    """

    name: str = "save"
    """Name of the stage in logs."""

    def __post_init__(self) -> None:
        expected = "a name; Trainer(saver=, parts=) decides what is saved and where"
        check_type("SaveCheckpoint", "name", self.name, str, expected)

    def run(self, trainer: Run) -> None:
        """Save; see :meth:`Trainer.save`."""
        trainer.save()


def check_stages(where: str, stages: Any) -> None:
    """Check that an argument is a sequence or a stream of stages.

    Raises:
        TypeError: The argument is not iterable, or an item of a sequence is not a stage.
    """
    if hasattr(stages, "run") or isinstance(stages, str) or not isinstance(stages, Iterable):
        hint = "; put it into a list" if hasattr(stages, "run") else ""
        raise TypeError(
            f"{where}: stages must be a sequence of stages, such as [Train(), Evaluate()], got "
            f"{describe_value(stages)}{hint}"
        )
    for number, stage in enumerate(stages if isinstance(stages, list | tuple) else ()):
        if isinstance(stage, type) or not callable(getattr(stage, "run", None)):
            raise TypeError(f"{where}: stages[{number}] must be a stage, such as Train(), got {describe_value(stage)}")


def _check_types(stage: Train | Evaluate) -> None:
    where = type(stage).__name__
    if not isinstance(stage.data, str):
        check_batches(where, "data", stage.data)
    check_type(where, "window", stage.window, (Window, type(None)), "a Window, or None")
    check_type(where, "step", stage.step, (str, type(None)), "the name of one of Trainer's steps, or None")
    check_type(where, "name", stage.name, str, "a name")
    if stage.transform is not None:
        check_callable(where, "transform", stage.transform, "a function of a batch, or None")
