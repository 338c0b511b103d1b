"""Trainer: runs the stages of a training and resumes an interrupted one."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext, suppress
from numbers import Integral
from typing import Any, Literal, NoReturn

from torch import Tensor

from recis_hybrid import distributed
from recis_hybrid.columnio import Window
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.arguments import check_batches, check_callable, check_step
from recis_hybrid.pipelines.callback import Callback, Record
from recis_hybrid.pipelines.data.read_ahead import ReadAhead, steps_ahead
from recis_hybrid.pipelines.data.sources import Sources
from recis_hybrid.pipelines.dispatch import Dispatcher, StepObserver
from recis_hybrid.pipelines.evaluate import evaluate
from recis_hybrid.pipelines.interruption import Interruption, WaitInterrupted
from recis_hybrid.pipelines.lockstep import RanksInterrupted
from recis_hybrid.pipelines.metrics_record import Recorder, frequencies
from recis_hybrid.pipelines.predict import predict
from recis_hybrid.pipelines.progress import Generators, Progress
from recis_hybrid.pipelines.rng import generator_states, seed_everything, set_generator_states
from recis_hybrid.pipelines.stages import Evaluate, Evict, SaveCheckpoint, Source, Stage, Train, check_stages
from recis_hybrid.pipelines.step_timer import StepTimer
from recis_hybrid.pipelines.steps.loss_guard import LossGuard
from recis_hybrid.pipelines.steps.metrics import Metrics, check_metrics
from recis_hybrid.pipelines.steps.step import Prefetching, Rehearsing, Replicated, Step, check_replicated, loss_of
from recis_hybrid.ragged import Batch, batch_size
from recis_hybrid.saver import Location, PerRank, Saver
from recis_hybrid.validation import check_integer, check_type, describe_value


class Trainer:
    """Runs stages (train, evaluate, evict, save) one after another.

    A step that is not logged does not synchronize the device.

    Training is distributed if torch.distributed is initialized, or if a launcher such as torchrun started several
    processes, which the constructor then joins. All ranks run the same stages. Towers start with the parameters of
    rank 0 and apply the mean gradient over the samples of all ranks, so they stay bitwise equal, with or without
    DistributedDataParallel. The ranks agree on each step before it starts: a rank that runs out of batches takes part
    with empty ones until all have reached the end of the pass. Logs cover all ranks and are written by rank 0.

    Args:
        step: The training step; or several by name, such as a teacher and a student, from which stages choose.
        train_data: The source ``"train"``: yields the batches of one pass each time it is iterated.
        eval_data: The source ``"eval"``.
        sources: Further sources by name.
        open_window: Opens the files of a stage's window.
        transform: Applied to each batch before the step, in the training thread; timed as ``features``.
        metrics: Metrics of evaluations: by name, for every objective; or by objective and name.
        saver: Writes and reads checkpoints.
        parts: Parts of checkpoints in addition to those of the steps; see ``Saver.save``.
        callbacks: Called in order during the training.
        accumulate: Number of batches per update.
        prefetch: Number of steps for which batches are read, and their ids sent to the ranks that own them, in advance.
            None: as many as the engines' ``prefetch_depth`` allows, which is one step if several ranks share the tables
            and none on one process (a ColumnDataset reads ahead by itself). Ids are sent from the second update on, and
            only for engines that read columns of the batches, not columns that the model computes.
        log_every: Number of steps between two records of the log. Each training stage also ends with a record.
        seed: Seed of all random generators of the process, set when a training starts. None: they are not seeded.

    Raises:
        RuntimeError: A launcher started several processes, but they cannot be joined.
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range.

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
        for name, value, low in (
            ("accumulate", accumulate, 1),
            ("log_every", log_every, 1),
            ("prefetch", 0 if prefetch is None else prefetch, 0),
            ("seed", 0 if seed is None else seed, 0),
        ):
            check_integer("Trainer", name, value, low=low)
        for name, mapping, example in (("sources", sources, "{'ads': data}"), ("parts", parts, "{'stats': stats}")):
            check_type("Trainer", name, mapping, (Mapping, type(None)), f"a mapping by name, such as {example}")
        for name, function in (("transform", transform), ("open_window", open_window)):
            if function is not None:
                check_callable("Trainer", name, function, "a function, or None")
        distributed.join("Trainer")
        self.steps: dict[str, Step] = dict(step) if isinstance(step, Mapping) else {"": step}
        """The steps by name."""
        named = {"train": train_data, "eval": eval_data, **(sources or {})}
        _check_types(self.steps, named, metrics, saver)
        self._sources = Sources({name: data for name, data in named.items() if data is not None}, open_window)
        self.transform = transform
        self.metrics: Metrics = metrics or {}
        self.saver = saver
        self.accumulate, self.log_every, self.seed = accumulate, log_every, seed
        self.figures: dict[str, dict[str, float]] = {}
        """Latest metrics of each evaluation, by the evaluation's name."""
        self.stopped: str | None = None
        """Reason for which a callback stopped the training; None if none did."""
        self._prefetch = prefetch
        self._parts = dict(parts or {})
        self._progress = Progress()
        self._stages: Iterable[Stage] = ()
        self._stage: Stage | None = None
        self._saved_step: int | None = None
        self._saved_path: Location | None = None
        self._unlogged: tuple[int, Location] | None = None
        self._timer, self._guard, self._recorder = StepTimer(), LossGuard(), Recorder()
        self._interruption = Interruption()
        self._dispatcher = Dispatcher(self, callbacks, self._rescue)
        for each in self.steps.values():
            if hasattr(each, "observer"):
                each.observer = StepObserver(self._timer, self._dispatcher)
            # With several steps, some may never be evaluated.
            if len(self.steps) == 1 and isinstance(each, Rehearsing):
                each.rehearse(self.metrics)

    def __repr__(self) -> str:
        steps = ", ".join(f"{name}: {step!r}" if name else repr(step) for name, step in self.steps.items())
        return (
            f"Trainer({steps}, sources={self._sources.names}, callbacks="
            f"[{', '.join(type(each).__name__ for each in self._dispatcher.callbacks)}], saver={self.saver!r}, "
            f"steps_done={self.steps_done}, samples={self.samples})"
        )

    @property
    def steps_done(self) -> int:
        """Completed training steps, including those before a restart."""
        return self._progress.steps

    @property
    def samples(self) -> int:
        """Rows that this rank has trained on, including padding rows."""
        return self._progress.samples

    @property
    def engines(self) -> list[EmbeddingEngine]:
        """Engines of all steps."""
        return list(dict.fromkeys(engine for step in self.steps.values() for engine in step.engines))

    def fit(
        self, stages: Iterable[Stage], *, resume: Literal["latest"] | int | None = None
    ) -> dict[str, dict[str, float]]:
        """Run stages.

        To resume a run, pass the same stages. Those before the checkpoint are skipped and the current one continues
        from its position, so the result is bitwise identical to that of an uninterrupted run. A generator of stages is
        iterated from its beginning and sees the same ``figures`` as in the first run; it should have no side effects.
        WindowStages restores its own position.

        Optimizers resume with the hyperparameters of the checkpoint, not with those that they were built with, like
        torch's ``load_state_dict``. To change one, set ``param_groups`` in a callback's ``before_fit``, which runs
        after the checkpoint is loaded.

        The first Ctrl-C, SIGTERM or SIGUSR1 ends the training between two steps, with a checkpoint if there is a saver.
        A second one ends the process immediately. Signals for which the program has set a handler are not handled.

        Args:
            stages: A list, a generator, or WindowStages.
            resume: Step of the checkpoint to resume from, or ``"latest"``, which starts from scratch if there is none.

        Returns:
            The latest metrics of each evaluation, by the evaluation's name.

        Raises:
            CallbackError: A callback raised; the state is saved.
            ExchangeError: Another rank failed or died.
            KeyboardInterrupt: After Ctrl-C; the state is saved.
            NonFiniteLossError: The loss is not finite; no checkpoint is written.
            SystemExit: After another signal, with the status 128 + its number; the state is saved.
            ValueError: There are checkpoints and ``resume`` is None, a stage would never end, several ranks would train
                separate models, or a rank has no batch.
        """
        with self._interruption:
            self._prepare(stages, resume)
            try:
                self._run(stages)
            except (WaitInterrupted, RanksInterrupted):
                self._end_interrupted()
            except BaseException as error:
                self._end(error)
                raise
            self._end(None)
            return self.figures

    def _run(self, stages: Iterable[Stage]) -> None:
        self._dispatcher.call("before_fit")
        if self.saver is not None and self._saved_step is not None and distributed.rank() == 0:
            self._log("loaded", {"digest": self.saver.digest(self._saved_step)})
        self._agree()
        remaining = self._progress.remaining(stages, self.figures)
        while (stage := self._next_stage(remaining)) is not None:
            self._agree()
            if self.stopped is not None:
                break
            self._stage = stage
            self._dispatcher.call("before_stage", stage)
            stage.run(self)
            # A run resumed after a stop continues with the rest of the stage.
            self._progress.finished = self.stopped is None or not isinstance(stage, Train)
            self._stage = None
            self._dispatcher.call("after_stage", stage)
            self._agree()
            if self.stopped is not None and self.saver is not None:
                self.save()
        self._agree()
        self._log_tables()
        self._log_saved(wait=True)
        self._agree()

    def _next_stage(self, remaining: Iterator[Stage]) -> Stage | None:
        # Several ranks may wait for each other here, for example for the next window, and must end the wait together.
        with self._interruption.waiting() if distributed.world_size() == 1 else nullcontext():
            return next(remaining, None)

    def _end_interrupted(self) -> NoReturn:
        """Save on all ranks after a signal, and raise the exception that ends the training."""
        for engine in self.engines:
            engine.drop_prefetched()
        received = self._interruption.requested
        error = self._interruption.error(received)
        try:
            outcome = self._save_after_signal()
        except BaseException as another:
            self._end(another)
            raise
        self._end(error)
        name = "a signal to another rank" if received is None else received.name
        note = f"ended by {name} after step {self.steps_done}; {outcome}"
        if distributed.rank() == 0:
            print(f"recis_hybrid: {note}", file=sys.stderr, flush=True)
        error.add_note(note)
        raise error from None

    def _save_after_signal(self) -> str:
        if self.saver is None:
            return "there is no saver, so nothing was saved"
        if self._progress.stages == 0:
            return "no stage had started, so nothing was saved"
        self.save()
        self._log_saved(wait=True)
        where = self._saved_path or f"the checkpoint of step {self.steps_done}"
        return f"the state is saved in {where}; continue with fit(..., resume='latest')"

    def train(self, stage: Train) -> None:
        """Train until a stage's bound is reached; ``Train`` calls this.

        Args:
            stage: The stage.

        Raises:
            NonFiniteLossError: The loss is not finite.
            ValueError: The stage would never end, there is no batch, or an engine's ``prefetch_depth`` is too small.
        """
        step, reader, progress = self._step(stage.step), self._sources.reader(stage), self._progress
        self._recorder.restart(progress.samples)
        figures: Mapping[str, Tensor | Metric] = {}
        depth = steps_ahead(step, self._prefetch, self.accumulate)
        ahead = ReadAhead(stage, reader, progress, self.accumulate, depth, self._interruption)
        while self.stopped is None and not progress.reached(stage):
            should_log = (progress.steps + 1) % self.log_every == 0
            with self._timer.measure(step.engines) if should_log else nullcontext():
                batches = self._next_batches(ahead, step, stage)
                if not batches:
                    continue
                figures = self._train_step(step, batches, ahead.rows)
            rows = sum(batch_size(batch) for batch in batches)
            if rows > 0:  # otherwise only other ranks have data left
                self._guard.watch(progress.steps, loss_of(figures), batches)
            self._recorder.means.add(figures, rows)
            if should_log:
                self._log_train(stage, self._timer.seconds)
            self._dispatcher.raise_deferred()
            self._dispatcher.call("after_step")
            if should_log or distributed.world_size() == 1:
                self._agree()
        if len(ahead) > 0:  # a callback stopped the training
            for engine in step.engines:
                engine.drop_prefetched()
        self._guard.check(wait=True)
        if figures and progress.steps % self.log_every != 0:
            self._log_train(stage, {})
        if self.stopped is None:
            self._sources.leave(reader)

    def _train_step(
        self, step: Step, batches: Sequence[Batch], rows: Sequence[Sequence[int]]
    ) -> Mapping[str, Tensor | Metric]:
        if rows and isinstance(step, Replicated):
            step.expect(rows)
        with self._dispatcher.within_step():
            self._dispatcher.call("before_step", batches)
            figures = step(*batches)
        progress = self._progress
        progress.steps, progress.stage_steps = progress.steps + 1, progress.stage_steps + 1
        progress.samples += sum(batch_size(batch) for batch in batches)
        return figures

    def _next_batches(self, ahead: ReadAhead, step: Step, stage: Train) -> Sequence[Batch]:
        """Return the batches of the next step; an empty list at the end of a pass."""
        while ahead.wants_more():
            start = time.perf_counter()
            batches = ahead.read()
            self._recorder.wait_seconds += time.perf_counter() - start
            batches = self._transform(batches, stage.transform)
            if ahead.depth > 0 and isinstance(step, Prefetching):
                for batch in batches:
                    step.prefetch(batch)
            ahead.put(batches)
        return ahead.take()

    def _transform(self, batches: list[Batch], transform: Callable[[Batch], Batch] | None) -> list[Batch]:
        for function in (self.transform, transform):
            if function is not None:
                with self._timer.phase("features"):
                    batches = [function(batch) for batch in batches]
        return batches

    def evaluate(self, stage: Evaluate) -> None:
        """Compute a stage's metrics and store them in ``figures``; ``Evaluate`` calls this."""
        start = time.perf_counter()
        metrics = self.metrics if stage.metrics is None else stage.metrics
        transforms = [function for function in (self.transform, stage.transform) if function is not None]
        step, data, generators = self._step(stage.step), self._sources.whole_pass(stage), generator_states()
        try:
            # Left before anything is logged or saved, because callbacks may save.
            with nullcontext() if stage.within is None else stage.within():
                figures = evaluate(step, data, metrics, transforms=transforms, interruption=self._interruption)
        except (WaitInterrupted, RanksInterrupted):
            set_generator_states(generators)  # a resumed run repeats the evaluation
            raise
        self.figures[stage.name] = figures
        if not hasattr(self._stages, "load_state_dict"):
            self._progress.figures[str(self._progress.stages)] = {stage.name: figures}
        named = {f"{stage.name}/{name}": value for name, value in figures.items()}
        self._log("eval", {"name": stage.name, "seconds": time.perf_counter() - start, **named})

    def predict(
        self, data: Source = "eval", *, columns: Sequence[str] = (), step: str | None = None
    ) -> Iterator[Batch]:
        """Yield the scores of all batches of a source, in order; see :func:`recis_hybrid.pipelines.predict`.

        Args:
            data: Name of a source, or batches.
            columns: Columns of the source's batches to yield too, such as row ids.
            step: Name of one of the trainer's steps; None: the first.

        Raises:
            KeyError: A batch lacks one of the columns.
            ValueError: There is no such source or step.
        """
        source = self._sources.whole_pass(Evaluate(data=data))
        return predict(self._step(step), source, columns=columns, transforms=[self.transform] if self.transform else [])

    def evict(self, stage: Evict) -> None:
        """Evict rows by a stage's rule; ``Evict`` calls this.

        Raises:
            ValueError: The stage has a rule for a table that no engine has; no row is evicted.
        """
        stage.refuse_unknown(self.engines)
        evicted = 0
        for engine in self.engines:
            evicted += engine.evict(stage.rule_of(engine))
            if stage.compact:
                engine.compact()
        self.count_evicted(evicted)
        self._log("evict", {"evicted": evicted})

    def count_evicted(self, rows: int) -> None:
        """Count rows that were evicted on this process, for the next record of the log."""
        self._recorder.evicted += rows

    def save(self, *, delta: bool = False) -> Location | None:
        """Write a checkpoint, unless the current step has one; ``SaveCheckpoint`` calls this.

        Args:
            delta: Save only the table rows that changed since the last checkpoint; see :meth:`Saver.save`.

        Returns:
            The directory of the checkpoint; None if the step had one already.

        Raises:
            ValueError: There is no saver.
        """
        if self.saver is None:
            raise ValueError("Trainer: there is no saver; pass Trainer(saver=Saver(path))")
        if self.steps_done in (self._saved_step, self.saver.latest()):
            return None
        self._log_saved(wait=True)
        self._guard.check(wait=True)
        self._dispatcher.call("before_save")
        path = self._save(delta)
        self._dispatcher.call("after_save", path)
        return path

    def _save(self, delta: bool) -> Location:
        assert self.saver is not None
        start = time.perf_counter()
        if isinstance(self._stage, SaveCheckpoint):
            self._progress.finished = True
        path = self.saver.save(self.steps_done, self.parts(), delta=delta)
        self._saved_step, self._saved_path = self.steps_done, path
        self._log("save", {"path": str(path), "seconds": time.perf_counter() - start})
        self._unlogged = self.steps_done, path
        self._log_saved()
        return path

    def _log_saved(self, *, wait: bool = False) -> None:
        """Log the digest of the last checkpoint, on rank 0, if it is complete; ``wait`` for a background save."""
        if self.saver is None or self._unlogged is None or distributed.rank() != 0:
            return
        step, path = self._unlogged
        if (digest := self.saver.digest(step, wait=wait)) is not None:
            self._unlogged = None
            self._dispatcher.call("on_log", {"event": "saved", "step": step, "path": str(path), "digest": digest})

    def stop(self, reason: str) -> None:
        """End the training after the current step, with a checkpoint if there is a saver; for callbacks.

        With several ranks, a request on one rank ends all of them after the next logged step or the next stage.

        Args:
            reason: Stored in ``stopped`` and logged.
        """
        self._dispatcher.request_stop(reason)

    def _agree(self) -> None:
        """Apply exceptions and requests of callbacks, and signals, on all ranks together."""
        reason, interrupted = self._dispatcher.agree(interrupted=self._interruption.requested is not None)
        if interrupted:
            raise RanksInterrupted
        if reason is not None and self.stopped is None:
            self.stopped = reason
            self._log("stop", {"reason": reason})

    def steps_left(self, stage: Stage) -> int | None:
        """Return the number of steps left in a training stage, 0 if unknown; None for other stages."""
        if not isinstance(stage, Train):
            return None
        data = None if stage.window is not None else self._sources.data(stage)
        return self._progress.steps_left(stage, len(data) if isinstance(data, Sized) else None, self.accumulate)

    def parts(self) -> dict[str, Any]:
        """Return the parts of a checkpoint by name: those of the steps, additional ones, and the trainer's state."""
        parts = dict(self._parts)
        for name, step in self.steps.items():
            # Parts shared by several steps, such as tables, are saved once.
            known = {id(value) for value in parts.values()}
            new = {part: value for part, value in step.parts().items() if id(value) not in known}
            parts |= {f"{name}.{part}" if name else part: value for part, value in new.items()}
        own: dict[str, Any] = {"trainer": self, "generators": PerRank(Generators(self._recorder.means))}
        for name in own.keys() & parts.keys():
            raise ValueError(f"Trainer: the part name {name!r} is reserved for the trainer; rename your part")
        return parts | own

    def state_dict(self) -> dict[str, Any]:
        """Return steps, stage, reading positions, and states of callbacks; equal on all ranks."""
        stream: Any = self._stages
        return {
            "place": self._progress.state_dict(),
            "figures": {name: dict(figures) for name, figures in self.figures.items()},
            "sources": self._sources.state_dict(),
            "stages": stream.state_dict() if hasattr(stream, "load_state_dict") else None,
            "callbacks": self._dispatcher.states(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned. Callbacks are matched by class and order."""
        self._progress = Progress(**state["place"])
        self.figures.clear()
        self.figures.update(state["figures"])
        self._sources.load_state_dict(state["sources"])
        stream: Any = self._stages
        if state["stages"] is not None and hasattr(stream, "load_state_dict"):
            stream.load_state_dict(state["stages"])
        self._dispatcher.load_states(state["callbacks"])

    def _prepare(self, stages: Iterable[Stage], resume: Literal["latest"] | int | None) -> None:
        """Reset the state of an earlier fit, load the checkpoint to resume from, and broadcast rank 0's towers."""
        check_stages("Trainer.fit", stages)
        if isinstance(resume, bool) or not (resume is None or resume == "latest" or isinstance(resume, Integral)):
            raise TypeError(f'Trainer.fit: resume must be "latest", the step of a checkpoint, or None, got {resume!r}')
        self._stages, self._stage = stages, None
        self._progress = Progress(self._progress.steps, self._progress.samples)
        self.stopped = self._saved_step = self._saved_path = self._unlogged = None
        self.figures.clear()
        self._recorder.means.clear()
        self._interruption.wake = getattr(stages, "stop", None)
        distributed.mark_gradients_averaged()
        check_replicated("Trainer.fit", self.steps)
        if resume is not None and self.saver is None:
            raise ValueError("Trainer.fit: resume needs a saver; pass Trainer(saver=Saver(path))")
        existing = [] if self.saver is None else self.saver.steps()
        if resume is None and max(existing, default=0) > self.steps_done:
            raise ValueError(
                f"Trainer.fit: there are checkpoints of the steps {existing}; continue from them with "
                f'resume="latest", or save to another directory'
            )
        resumes = self.saver is not None and resume is not None and bool(existing or resume != "latest")
        if self.seed is not None and (resumes or self.steps_done == 0):
            # A rank that the checkpoint has no generators of keeps these.
            seed_everything(self.seed, rank=distributed.rank())
        if resumes and self.saver is not None and resume is not None:
            self._saved_step = self.saver.load(self.parts(), resume)
        if distributed.world_size() > 1:
            for step in self.steps.values():
                assert isinstance(step, Replicated)
                step.synchronize()

    def _end(self, error: BaseException | None) -> None:
        """Finish the callbacks and wait for a save in the background."""
        self._sources.close()
        if error is not None:
            with suppress(Exception):  # the log is incomplete, which must not hide the error
                self._log_saved(wait=True)
        self._dispatcher.finish(error)
        if self.saver is None:
            return
        try:
            self.saver.wait()
        except Exception as another:
            if error is None:
                raise
            error.add_note(f"the save in the background also failed: {another}")
        if error is not None:
            latest = self.saver.latest()
            error.add_note("there is no checkpoint" if latest is None else f"the latest checkpoint is of step {latest}")

    def _rescue(self) -> str:
        """Save after a callback raised and return a sentence about the outcome."""
        if self.saver is None:
            return "there is no saver, so nothing was saved"
        try:
            if self._saved_step != self.steps_done:
                self._saved_step = self.steps_done
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

    def _log_train(self, stage: Train, phases: Mapping[str, float]) -> None:
        record = self._recorder.train_record(
            steps=self.steps_done, samples=self.samples, engines=self.engines, parts=self.parts(), phases=phases
        )
        self._log("train", {"name": stage.name, **record})
        self._log_saved()

    def _log_tables(self) -> None:
        # Counting is collective, but ranks may have different callbacks.
        if self._dispatcher.callbacks or distributed.world_size() > 1:
            self._log("tables", {"tables": frequencies(self.engines)})

    def _log(self, event: str, figures: Mapping[str, Any]) -> None:
        record: Record = {"event": event, "step": self.steps_done, **figures}
        self._dispatcher.call("on_log", record)


def _check_types(steps: Mapping[str, Any], sources: Mapping[str, Any], metrics: Any, saver: Any) -> None:
    for name, step in steps.items():
        check_step("Trainer", f"the step {name!r}" if name else "step", step)
    for name, data in sources.items():
        if data is not None:
            check_batches("Trainer", f"{name}_data" if name in ("train", "eval") else f"the source {name!r}", data)
    if metrics is not None:
        check_metrics("Trainer", metrics)
    if isinstance(saver, type) or not (saver is None or hasattr(saver, "latest")):
        raise TypeError(f"Trainer: saver must be a Saver, such as Saver('run'), or None, got {describe_value(saver)}")
