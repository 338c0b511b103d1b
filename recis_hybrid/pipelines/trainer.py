"""Trainer: runs the stages of a training, and goes on where an interrupted one was."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from numbers import Integral
from typing import Any, Literal, NoReturn

from torch import Tensor

from recis_hybrid import distributed
from recis_hybrid.columnio import Window
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.arguments import (
    described,
    refuse_no_batches,
    refuse_no_callable,
    refuse_no_count,
    refuse_no_step,
    refuse_other_than,
)
from recis_hybrid.pipelines.callback import Callback, Record
from recis_hybrid.pipelines.data.read_ahead import ReadAhead, steps_ahead
from recis_hybrid.pipelines.data.sources import Sources
from recis_hybrid.pipelines.dispatch import Hooks, Watcher
from recis_hybrid.pipelines.evaluate import Metrics, evaluate, refuse_no_metrics
from recis_hybrid.pipelines.interruption import Interruption, WaitInterrupted
from recis_hybrid.pipelines.metrics_record import Recorder
from recis_hybrid.pipelines.predict import predict
from recis_hybrid.pipelines.progress import Place
from recis_hybrid.pipelines.rng import Generators, generator_states, seed_everything, set_generator_states
from recis_hybrid.pipelines.stages import Evaluate, Evict, SaveCheckpoint, Source, Stage, Train
from recis_hybrid.pipelines.step_timer import Clock
from recis_hybrid.pipelines.steps.loss_guard import LossGuard
from recis_hybrid.pipelines.steps.step import Prefetching, Rehearsing, Replicated, Step, loss_of
from recis_hybrid.pipelines.turns import RanksInterrupted
from recis_hybrid.ragged import Batch, batch_size
from recis_hybrid.saver import Location, PerRank, Saver


class Trainer:
    """Runs stages (train, evaluate, evict, save) one after another.

    A step that is not logged waits for no device.

    Where torch.distributed is initialised, or a launcher such as torchrun has started several processes, which then
    join here, every rank runs the same stages. Towers start as rank 0's and take the mean gradient over the samples of
    all ranks, so that they stay bitwise the same, in DistributedDataParallel or not. Before each step the ranks agree
    on it: one that has no batch left takes part with an empty one until all have come to the end of the pass. Logs are
    of all ranks, and rank 0 writes them.

    Args:
        step: What is done with batches; or several by name, of which stages choose, a teacher and a student for
            instance.
        train_data: The source ``"train"``: gives the batches of one pass each time it is iterated.
        eval_data: The source ``"eval"``.
        sources: Further sources by name.
        open_window: Opens the files of a stage's window.
        transform: Made of each batch before the step, in the training thread; timed as ``features``.
        metrics: Of evaluations: by name, for each objective; or by objective and name.
        saver: Where checkpoints go.
        parts: What checkpoints hold beside what the steps name, as ``Saver.save`` takes it.
        callbacks: Called as the training goes on, in their order.
        accumulate: How many batches an update takes.
        prefetch: How many steps ahead batches are read, and their ids sent to the ranks that own them. None: as many as
            the engines are built for, which send ``prefetch_depth`` batches ahead: one step where several ranks share
            the tables, none on one process (a ColumnDataset reads ahead anyhow).
        log_every: Steps from one line of the log to the next; each training stage ends with one, too.
        seed: Of all generators of the process, set when a training begins anew; None leaves them.

    Raises:
        RuntimeError: If a launcher has started several processes and they cannot be joined.
        TypeError: If an argument is of another kind.
        ValueError: If accumulate or log_every is less than 1, or prefetch or seed negative.

    Example:
        >>> from recis_hybrid import optim
        >>> from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
        >>> from recis_hybrid.metrics import AUC
        >>> engine = EmbeddingEngine({"id": EmbeddingConfig(dim=1)}, optimizer=optim.SGD)
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.engine = engine
        ...     def forward(self, batch):
        ...         return self.engine(batch)["id"][:, 0]
        >>> batches = [{"id": torch.tensor([1, 2]), "label": torch.tensor([0.0, 1.0])}]
        >>> bce = torch.nn.functional.binary_cross_entropy_with_logits
        >>> step = TorchStep(Model(), bce, [optim.SGD(engine.parameters(), lr=1.0)])
        >>> trainer = Trainer(step, batches, batches, metrics={"auc": AUC()})
        >>> trainer.fit([Train(epochs=5), Evaluate()])
        {'eval': {'auc': 1.0}}
    """

    def __init__(
        self,
        step: Step | Mapping[str, Step],
        train_data: Iterable[Batch] | None = None,
        eval_data: Iterable[Batch] | None = None,
        *,
        sources: Mapping[str, Iterable[Batch]] | None = None,
        open_window: Callable[[Window], Iterable[Batch]] | None = None,
        transform: Callable[[Batch], Batch] | None = None,
        metrics: Metrics | None = None,
        saver: Saver | None = None,
        parts: Mapping[str, object] | None = None,
        callbacks: Sequence[Callback] = (),
        accumulate: int = 1,
        prefetch: int | None = None,
        log_every: int = 50,
        seed: int | None = None,
    ) -> None:
        for name, value, least in (
            ("accumulate", accumulate, 1),
            ("log_every", log_every, 1),
            ("prefetch", 0 if prefetch is None else prefetch, 0),
            ("seed", 0 if seed is None else seed, 0),
        ):
            refuse_no_count("Trainer", name, value, least)
        distributed.join("Trainer")
        self.steps: dict[str, Step] = dict(step) if isinstance(step, Mapping) else {"": step}
        for name, part, example in (("sources", sources, "{'ads': data}"), ("parts", parts, "{'stats': stats}")):
            refuse_other_than("Trainer", name, part, (Mapping, type(None)), f"a mapping by name, as {example}")
        given = {"train": train_data, "eval": eval_data, **(sources or {})}
        _refuse_kinds(self.steps, given, metrics, saver)
        callbacks = _callbacks(callbacks)
        for name, function in (("transform", transform), ("open_window", open_window)):
            if function is not None:
                refuse_no_callable("Trainer", name, function, "a function, or None")
        self._sources = Sources({name: data for name, data in given.items() if data is not None}, open_window)
        self.transform = transform
        self.metrics: Metrics = metrics or {}
        self.saver = saver
        self.accumulate, self.log_every, self.seed = accumulate, log_every, seed
        self.figures: dict[str, dict[str, float]] = {}
        """By name of the evaluation, what it gave last."""
        self.stopped: str | None = None
        """Why a callback has stopped the training."""
        self._prefetch = prefetch
        self._parts = dict(parts or {})
        self._place = Place()
        self._stages: Iterable[Stage] = ()
        self._stage: Stage | None = None
        self._saved: int | None = None
        self._saved_in: Location | None = None
        self._clock, self._guard, self._recorder = Clock(), LossGuard(), Recorder()
        self._interruption = Interruption()
        self._hooks = Hooks(self, callbacks, self._rescue)
        for each in self.steps.values():
            if hasattr(each, "observer"):
                each.observer = Watcher(self._clock, self._hooks)
            # Of several steps, some may never be evaluated.
            if len(self.steps) == 1 and isinstance(each, Rehearsing):
                each.rehearse(self.metrics)

    @property
    def steps_done(self) -> int:
        """Training steps done, those before a resumption included."""
        return self._place.steps

    @property
    def samples(self) -> int:
        """Rows that this rank has trained on, those that only fill a batch up included."""
        return self._place.samples

    @property
    def engines(self) -> list[EmbeddingEngine]:
        """The engines of all steps."""
        return list(dict.fromkeys(engine for step in self.steps.values() for engine in step.engines))

    def fit(
        self, stages: Iterable[Stage], *, resume: Literal["latest"] | int | None = None
    ) -> dict[str, dict[str, float]]:
        """Run stages.

        A run that is resumed is given the same stages: what was done before the checkpoint is left out, and the stage
        that was under way goes on where it was, so that it ends bitwise as if it had not been interrupted. A generator
        is gone through from its beginning for that, and finds in ``figures`` what it found then; it should do nothing
        but yield stages. WindowStages goes on by itself.

        Optimizers go on by the checkpoint's hyperparameters, as by torch's ``load_state_dict``: another learning rate
        that they were built with does not count. To go on by another one, set ``param_groups`` in a callback's
        ``before_fit``, which is called after the checkpoint was loaded.

        Args:
            stages: A list, a generator, or WindowStages.
            resume: The step of a checkpoint to go on from, or ``"latest"``, which begins anew where there is none.

        Returns:
            By name of the evaluation, what it gave last.

        The first Ctrl-C, SIGTERM or SIGUSR1 ends it between two steps, with a checkpoint if there is a saver; a second
        one ends the process at once. Signals that have a handler of the program's own are left to it.

        Raises:
            CallbackError: A callback has raised; the state was saved.
            ExchangeError: Another rank has failed or died.
            KeyboardInterrupt: After Ctrl-C; the state was saved.
            NonFiniteLossError: The loss is no finite number; checkpoints stay as they are.
            SystemExit: After another signal, with the status 128 + its number; the state was saved.
            ValueError: There are checkpoints and ``resume`` is None, or a stage would never end; or several ranks train
                what they have each for themselves, or one of them has no batch.
        """
        with self._interruption:
            return self._fit(stages, resume)

    def _fit(self, stages: Iterable[Stage], resume: Literal["latest"] | int | None) -> dict[str, dict[str, float]]:
        self._begin(stages, resume)
        try:
            self._hooks.call("before_fit")
            self._agree()
            remaining = self._place.remaining(stages, self.figures)
            while (stage := self._next_stage(remaining)) is not None:
                self._agree()
                if self.stopped is not None:
                    break
                self._stage = stage
                self._hooks.call("before_stage", stage)
                stage.run(self)
                # A run that is resumed after a stop goes on with the rest of the stage.
                self._place.finished = self.stopped is None or not isinstance(stage, Train)
                self._stage = None
                self._hooks.call("after_stage", stage)
                self._agree()
                if self.stopped is not None and self.saver is not None:
                    self.save()
            self._agree()
            self._log_tables()
            self._agree()
        except (WaitInterrupted, RanksInterrupted):
            self._end_interrupted()
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)
        return self.figures

    def _next_stage(self, remaining: Iterator[Stage]) -> Stage | None:
        # Several ranks may be waiting for each other there, as for the next window, and leave that together.
        with self._interruption.waiting() if distributed.world_size() == 1 else nullcontext():
            return next(remaining, None)

    def _end_interrupted(self) -> NoReturn:
        """Save after a signal, on all ranks together, and raise the exception that ends the training."""
        for engine in self.engines:
            engine.drop_prefetched()
        error = self._interruption.error(self._interruption.requested)
        try:
            said = self._saved_by_signal()
        except BaseException as another:
            self._end(another)
            raise
        self._end(error)
        name = "a signal to another rank" if self._interruption.requested is None else self._interruption.requested.name
        said = f"ended by {name} after step {self.steps_done}; {said}"
        if distributed.rank() == 0:
            print(f"recis_hybrid: {said}", file=sys.stderr, flush=True)
        error.add_note(said)
        raise error from None

    def _saved_by_signal(self) -> str:
        if self.saver is None:
            return "there is no saver, so nothing was saved"
        if self._place.stages == 0:
            return "no stage had begun, so there was nothing to save"
        self.save()
        where = self._saved_in or f"the checkpoint of step {self.steps_done}"
        return f"the state is saved in {where}, and fit(..., resume='latest') goes on from it"

    def train(self, stage: Train) -> None:
        """Trains until the bound of a stage is reached: what ``Train`` runs.

        Args:
            stage: The bound, and where batches come from.

        Raises:
            NonFiniteLossError: The loss is no finite number.
            ValueError: The stage would never end, there is no batch, or engines cannot send so far ahead.
        """
        step, reader, place = self._step(stage.step), self._sources.reader(stage), self._place
        self._recorder.restart(place.samples)
        watched: Mapping[str, Tensor | Metric] = {}
        depth = steps_ahead(step, self._prefetch, self.accumulate)
        ahead = ReadAhead(stage, reader, place, self.accumulate, depth, self._interruption)
        while self.stopped is None and not place.reached(stage):
            logs = (place.steps + 1) % self.log_every == 0
            with self._clock.measuring(step.engines) if logs else nullcontext():
                batches = self._next(ahead, step, stage)
                if not batches:
                    continue
                watched = self._train_step(step, batches, ahead.rows)
            rows = sum(batch_size(batch) for batch in batches)
            if rows > 0:  # else other ranks alone have data left
                self._guard.watch(place.steps, loss_of(watched), batches)
            self._recorder.means.add(watched, rows)
            if logs:
                self._log_train(stage, self._clock.seconds)
            self._hooks.settle()
            self._hooks.call("after_step")
            if logs or distributed.world_size() == 1:
                self._agree()
        if len(ahead) > 0:  # a callback has stopped the training
            for engine in step.engines:
                engine.drop_prefetched()
        self._guard.look(wait=True)
        if watched and place.steps % self.log_every != 0:
            self._log_train(stage, {})
        if self.stopped is None:
            self._sources.leave(reader)

    def _train_step(
        self, step: Step, batches: Sequence[Batch], rows: Sequence[Sequence[int]]
    ) -> Mapping[str, Tensor | Metric]:
        if rows and isinstance(step, Replicated):
            step.expect(rows)
        with self._hooks.within_step():
            self._hooks.call("before_step", batches)
            watched = step(*batches)
        place = self._place
        place.steps, place.stage_steps = place.steps + 1, place.stage_steps + 1
        place.samples += sum(batch_size(batch) for batch in batches)
        return watched

    def _next(self, ahead: ReadAhead, step: Step, stage: Train) -> Sequence[Batch]:
        """Return the batches of the next step; none where a pass has ended."""
        while ahead.wants_more():
            begin = time.perf_counter()
            batches = ahead.read()
            self._recorder.waited += time.perf_counter() - begin
            batches = self._transformed(batches, stage.transform)
            if ahead.depth > 0 and isinstance(step, Prefetching):
                for batch in batches:
                    step.prefetch(batch)
            ahead.put(batches)
        return ahead.take()

    def _transformed(self, batches: list[Batch], transform: Callable[[Batch], Batch] | None) -> list[Batch]:
        for function in (self.transform, transform):
            if function is not None:
                with self._clock.phase("features"):
                    batches = [function(batch) for batch in batches]
        return batches

    def evaluate(self, stage: Evaluate) -> None:
        """Compute a stage's metrics: what ``Evaluate`` runs. They are kept in ``figures``."""
        begin = time.perf_counter()
        metrics = self.metrics if stage.metrics is None else stage.metrics
        transforms = [function for function in (self.transform, stage.transform) if function is not None]
        step, data, generators = self._step(stage.step), self._sources.whole_pass(stage), generator_states()
        try:
            figures = evaluate(step, data, metrics, transforms=transforms, interruption=self._interruption)
        except (WaitInterrupted, RanksInterrupted):
            set_generator_states(generators)  # a run that is resumed evaluates from the start
            raise
        self.figures[stage.name] = figures
        if not hasattr(self._stages, "load_state_dict"):
            self._place.figures[str(self._place.stages)] = {stage.name: figures}
        named = {f"{stage.name}/{name}": value for name, value in figures.items()}
        self._log("eval", {"name": stage.name, "seconds": time.perf_counter() - begin, **named})

    def predict(
        self, data: Source = "eval", *, columns: Sequence[str] = (), step: str | None = None
    ) -> Iterator[Batch]:
        """Yield the scores of all batches of a source, in its order; see :func:`recis_hybrid.pipelines.predict`.

        Args:
            data: The name of a source, or batches.
            columns: Columns of the source's batches to hand on beside the scores, ids of rows for instance.
            step: Which of the trainer's steps; None: the first.

        Raises:
            KeyError: A batch lacks one of the columns.
            ValueError: There is no such source or step.
        """
        source = self._sources.whole_pass(Evaluate(data=data))
        return predict(self._step(step), source, columns=columns, transforms=[self.transform] if self.transform else [])

    def evict(self, stage: Evict) -> None:
        """Give rows up: what ``Evict`` runs."""
        evicted = 0
        for engine in self.engines:
            evicted += engine.evict(stage.rule)
            if stage.compact:
                engine.compact()
        self._recorder.evicted += evicted
        self._log("evict", {"evicted": evicted})

    def save(self, *, delta: bool = False) -> Location | None:
        """Write a checkpoint of everything, unless there is one of this step: what ``SaveCheckpoint`` runs.

        Args:
            delta: Whether to write of tables just what changed since the last one; see :meth:`Saver.save`.

        Returns:
            Its directory; None if there was one.

        Raises:
            ValueError: There is no saver.
        """
        if self.saver is None:
            raise ValueError("Trainer: there is no saver to save with; give Trainer(saver=Saver(path))")
        if self.steps_done in (self._saved, self.saver.latest()):
            return None
        self._guard.look(wait=True)
        self._hooks.call("before_save")
        path = self._save(delta)
        self._hooks.call("after_save", path)
        return path

    def _save(self, delta: bool) -> Location:
        assert self.saver is not None
        begin = time.perf_counter()
        if isinstance(self._stage, SaveCheckpoint):
            self._place.finished = True
        path = self.saver.save(self.steps_done, self.parts(), delta=delta)
        self._saved, self._saved_in = self.steps_done, path
        self._log("save", {"path": str(path), "seconds": time.perf_counter() - begin})
        return path

    def stop(self, reason: str) -> None:
        """End the training after the step under way, with a checkpoint if there is a saver; for callbacks.

        Where one of several ranks asks for it, all end after the next step that is logged, or stage.

        Args:
            reason: Kept in ``stopped``, and logged.
        """
        self._hooks.wish_to_stop(reason)

    def _agree(self) -> None:
        """Apply errors of callbacks, and requests of callbacks and signals, on all ranks at once."""
        reason, interrupted = self._hooks.agree(interrupted=self._interruption.requested is not None)
        if interrupted:
            raise RanksInterrupted
        if reason is not None and self.stopped is None:
            self.stopped = reason
            self._log("stop", {"reason": reason})

    def steps_left(self, stage: Stage) -> int | None:
        """Return how many steps a training stage still has, 0 if that cannot be known; None for other stages."""
        if not isinstance(stage, Train):
            return None
        data = None if stage.window is not None else self._sources.data(stage)
        return self._place.left(stage, len(data) if isinstance(data, Sized) else None, self.accumulate)

    def parts(self) -> dict[str, Any]:
        """Return what a checkpoint holds, by name: the steps' parts, further ones, the trainer itself, generators."""
        parts = dict(self._parts)
        for name, step in self.steps.items():
            # What several steps share, as tables, is saved once.
            known = {id(value) for value in parts.values()}
            own = {part: value for part, value in step.parts().items() if id(value) not in known}
            parts |= {f"{name}.{part}" if name else part: value for part, value in own.items()}
        mine: dict[str, Any] = {"trainer": self, "generators": PerRank(Generators(self._recorder.means))}
        for name in mine.keys() & parts.keys():
            raise ValueError(f"Trainer: the part {name!r} is the trainer's own; save yours by another name")
        return parts | mine

    def state_dict(self) -> dict[str, Any]:
        """Return the place: steps, stage, reading positions, and the state of callbacks; the same on all ranks."""
        stream: Any = self._stages
        return {
            "place": self._place.state_dict(),
            "figures": {name: dict(figures) for name, figures in self.figures.items()},
            "sources": self._sources.state_dict(),
            "stages": stream.state_dict() if hasattr(stream, "load_state_dict") else None,
            "callbacks": self._hooks.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; callbacks by their class and order."""
        self._place = Place(**state["place"])
        self.figures.clear()
        self.figures.update(state["figures"])
        self._sources.load_state_dict(state["sources"])
        stream: Any = self._stages
        if state["stages"] is not None and hasattr(stream, "load_state_dict"):
            stream.load_state_dict(state["stages"])
        self._hooks.load_state(state["callbacks"])

    def _begin(self, stages: Iterable[Stage], resume: Literal["latest"] | int | None) -> None:
        _refuse_no_stages(stages, resume)
        self._stages, self._stage = stages, None
        self._place = Place(self._place.steps, self._place.samples)
        self.stopped = self._saved = self._saved_in = None
        self.figures.clear()
        self._recorder.means.clear()
        self._interruption.wake = getattr(stages, "stop", None)
        self._join()
        if resume is not None and self.saver is None:
            raise ValueError("Trainer.fit: resume needs a saver; give Trainer(saver=Saver(path))")
        existing = [] if self.saver is None else self.saver.steps()
        if resume is None and max(existing, default=0) > self.steps_done:
            raise ValueError(
                f"Trainer.fit: there are checkpoints of the steps {existing} already; go on from them by "
                f'resume="latest", or save in another directory'
            )
        resumes = self.saver is not None and resume is not None and bool(existing or resume != "latest")
        if self.seed is not None and (resumes or self.steps_done == 0):
            seed_everything(
                self.seed, rank=distributed.rank()
            )  # which a rank keeps that was not there when it was saved
        if resumes and self.saver is not None and resume is not None:
            self._saved = self.saver.load(self.parts(), resume)
        if distributed.world_size() > 1:
            for step in self.steps.values():
                assert isinstance(step, Replicated)
                step.synchronise()

    def _join(self) -> None:
        """Check that everything trained is equal on all ranks, or shared by them.

        Raises:
            ValueError: An engine is this process's own, or a step does not average gradients.
        """
        distributed.mark_gradients_averaged()
        ranks = distributed.world_size()
        if ranks == 1:
            return
        for name, step in self.steps.items():
            which = f"the step {name!r}" if name else "the step"
            if not isinstance(step, Replicated):
                raise ValueError(
                    f"Trainer.fit: {ranks} ranks train together, but {which} ({type(step).__name__}) has no "
                    f"synchronise() and expect(), which keep the towers of the ranks equal (pipelines.Replicated); add "
                    f"them, or train on one process"
                )
            for engine in step.engines:
                shared = 1 if engine.group is None else distributed.world_size(engine.group)
                if shared < ranks and any(not table.read_only for table in engine.tables):
                    raise ValueError(
                        f"Trainer.fit: {ranks} ranks train together, but the tables of {which} are shared by {shared}, "
                        f"so that ranks would train different tables; build the EmbeddingEngine after "
                        f"init_process_group, and without group="
                    )

    def _end(self, error: BaseException | None) -> None:
        """End callbacks and a save in the background."""
        self._sources.close()
        self._hooks.finish(error)
        if self.saver is None:
            return
        try:
            self.saver.wait()
        except Exception as another:
            if error is None:
                raise
            error.add_note(f"the save in the background failed, too: {another}")
        if error is not None:
            latest = self.saver.latest()
            error.add_note("there is no checkpoint" if latest is None else f"the latest checkpoint is of step {latest}")

    def _rescue(self) -> str:
        """Save after a callback has raised, and says what came of it."""
        if self.saver is None:
            return "there is no saver, so nothing was saved"
        try:
            if self._saved != self.steps_done:
                self._saved = self.steps_done
                self.saver.save(self.steps_done, self.parts())
        except Exception as error:
            return f"the state could not be saved: {error}"
        return f"the state of step {self.steps_done} is saved"

    def _step(self, name: str | None) -> Step:
        if name is None:
            return next(iter(self.steps.values()))
        if name not in self.steps:
            raise ValueError(f"Trainer: there is no step {name!r}, there are {sorted(self.steps)}")
        return self.steps[name]

    def _log_train(self, stage: Train, seconds: Mapping[str, float]) -> None:
        self._log("train", {"name": stage.name, **self._recorder.of_step(self, seconds)})

    def _log_tables(self) -> None:
        # Ranks may have other callbacks, but look at their tables together.
        if self._hooks.callbacks or distributed.world_size() > 1:
            self._log("tables", {"tables": self._recorder.frequencies(self.engines)})

    def _log(self, event: str, figures: Mapping[str, Any]) -> None:
        record: Record = {"event": event, "step": self.steps_done, **figures}
        self._hooks.call("on_log", record)


def _refuse_kinds(
    steps: Mapping[str, Any],
    sources: Mapping[str, Any],
    metrics: Any,
    saver: Any,
) -> None:
    """Raise TypeError for arguments of the wrong kind."""
    for name, step in steps.items():
        refuse_no_step("Trainer", f"the step {name!r}" if name else "step", step)
    for name, data in sources.items():
        if data is not None:
            refuse_no_batches("Trainer", f"{name}_data" if name in ("train", "eval") else f"the source {name!r}", data)
    if metrics is not None:
        refuse_no_metrics("Trainer", metrics)
    if isinstance(saver, type) or not (saver is None or hasattr(saver, "latest")):
        raise TypeError(f"Trainer: saver must be a Saver, as Saver('run'), or None, got {described(saver)}")


def _callbacks(callbacks: Any) -> list[Callback]:
    """Return callbacks as a list; raises TypeError unless they are a sequence of them."""
    if isinstance(callbacks, Callback | str) or not isinstance(callbacks, Iterable):
        hint = "; put it into a list" if isinstance(callbacks, Callback) else ""
        raise TypeError(f"Trainer: callbacks must be a sequence of callbacks, got {described(callbacks)}{hint}")
    given = list(callbacks)
    for number, callback in enumerate(given):
        refuse_other_than("Trainer", f"callbacks[{number}]", callback, Callback, "a Callback, as ProgressBar()")
    return given


def _refuse_no_stages(stages: Any, resume: Any) -> None:
    """Raise TypeError unless stages are a sequence or a stream, and ``resume`` names a checkpoint."""
    if hasattr(stages, "run") or isinstance(stages, str) or not isinstance(stages, Iterable):
        hint = "; put it into a list" if hasattr(stages, "run") else ""
        raise TypeError(
            f"Trainer.fit: stages must be a sequence of stages, as [Train(), Evaluate()], got {described(stages)}{hint}"
        )
    for number, stage in enumerate(stages if isinstance(stages, list | tuple) else ()):
        if isinstance(stage, type) or not callable(getattr(stage, "run", None)):
            raise TypeError(f"Trainer.fit: stages[{number}] must be a stage, as Train(), got {described(stage)}")
    if isinstance(resume, bool) or not (resume is None or resume == "latest" or isinstance(resume, Integral)):
        raise TypeError(f'Trainer.fit: resume must be "latest", the step of a checkpoint, or None, got {resume!r}')
