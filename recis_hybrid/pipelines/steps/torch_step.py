"""TorchStep: forward, backward and update of a torch module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from recis_hybrid import distributed
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.arguments import (
    described,
    modules_of,
    optimizers_of,
    refuse_no_batch,
    refuse_no_name,
    refuse_no_number,
    refuse_other_than,
)
from recis_hybrid.pipelines.evaluate import Metrics, by_objective, rehearse, update
from recis_hybrid.pipelines.metrics_record import RESERVED, is_reserved
from recis_hybrid.pipelines.steps import model_outputs
from recis_hybrid.pipelines.steps.gradient_sync import GradientSync, unscaled_together
from recis_hybrid.pipelines.steps.objective import Loss, Objective, UncertaintyWeights
from recis_hybrid.pipelines.steps.step import NoObserver, Observer, Scored, column_of
from recis_hybrid.pipelines.steps.trainable import held_by, named_parameters, refuse_untrained
from recis_hybrid.ragged import Batch, batch_size
from recis_hybrid.saver.parts.module_names import unwrapped, without_wrappers

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]


class Scheduler(Protocol):
    """A learning-rate schedule: torch's, or :class:`LrSchedule`."""

    def step(self) -> Any:
        """Is called after each update."""

    def state_dict(self) -> dict[str, Any]:
        """Hands out the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state back."""


@dataclass(frozen=True, eq=False)
class _Answer:
    """The model's outputs for an objective."""

    outputs: Any
    loss: Tensor | None
    """The loss that the model returned."""


class TorchStep:
    """Forward, backward and update of a torch module, for one objective or several.

    Every parameter that takes gradients, and every table, has one optimizer. What is not to be trained is frozen
    explicitly: by ``requires_grad_(False)``, ``EmbeddingConfig(trainable=False)``, or ``freeze``.

    Labels of any dtype, ``[B]`` or ``[B, 1]``, are brought into the shape and dtype of the outputs; integers beside
    outputs ``[B, K]`` stay classes. Rows that the bool column ``mask`` of a batch says False of
    (``ShardOptions(uneven="pad")`` adds it) count neither in losses nor in predictions; a model that returns its own
    loss has to leave them out itself.

    Args:
        model: Batch → outputs ``[B]``; by objective where there are several. A loss function is given whatever the
            model returns, also a tuple or a dict; metrics are then of its ``logits``, or of the first of a tuple,
            unless ``Objective(link=)`` says otherwise.
        loss: (outputs, labels) → scalar; an Objective; or objectives by name. None: the model returns its own loss, as
            ``loss``, ``(loss, outputs)``, or a dict or object with ``loss`` and ``logits``.
        optimizers: Dense and sparse ones; by the names under which they are saved, or a sequence. With none the step
            only predicts.
        label: The column of labels, where ``loss`` is a function or None. None: there are none, ``loss`` takes the
            outputs alone, and nothing is evaluated.
        groups: The column of groups for metrics by group, int64 ``[B]``, where ``loss`` is a function or None.
        precision: What towers compute in (autocast). With float16 losses are scaled, and updates left out where
            gradients, those of rows included, overflow; that waits for the device at each step.
        clip_grad_norm: Largest global norm of all gradients, those of tables included; None leaves them.
        schedules: Step after each update.
        weighting: Learns what the objectives weigh, whose own weights are then not looked at.
        compile: Modules, towers as a rule, to be compiled by ``torch.compile`` in place.
        loss_scale: The first scale of losses, for float16.
        freeze: Modules of the model that this step leaves as they are, since another step trains them. Their parameters
            take no gradients while the step runs. Under DistributedDataParallel, wrap such parts each for itself.
        metrics: Of training, by name, for each objective; or by objective and name. They are updated with each batch
            that is trained on, and Trainer computes and resets them for each line of the log. :class:`AUC` keeps all
            rows since then, :class:`BinnedAUC` keeps counts.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If precision is unknown, a parameter or table has no optimizer or more than one, an optimizer has
            parameters that are not the model's or the name of another part of checkpoints, or a schedule waits for a
            metric.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Objective | Mapping[str, Objective] | None,
        optimizers: Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer],
        *,
        label: str | None = "label",
        groups: str | None = None,
        precision: Precision = "float32",
        clip_grad_norm: float | None = None,
        schedules: Sequence[Scheduler] = (),
        weighting: UncertaintyWeights | None = None,
        compile: Iterable[nn.Module] = (),
        loss_scale: float = 65536.0,
        freeze: Iterable[nn.Module] = (),
        metrics: Metrics | None = None,
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"TorchStep: precision must be one of {list(get_args(Precision))}, got {precision!r}")
        refuse_other_than("TorchStep", "model", model, nn.Module, "a torch.nn.Module, as TorchStep(model, loss, [...])")
        if type(model).__module__ == "torch.nn.modules.loss":
            raise TypeError(f"TorchStep: model is {described(model)}, a loss; write TorchStep(model, loss, [...])")
        for name, value in (("clip_grad_norm", clip_grad_norm), ("loss_scale", loss_scale)):
            if value is not None:
                refuse_no_number("TorchStep", name, value)
                if not value > 0:
                    raise ValueError(f"TorchStep: {name} must be above 0, got {value}")
        self.model = model
        self.objectives: dict[str, Objective] = _objectives(loss, label, groups)
        self.optimizers: dict[str, torch.optim.Optimizer] = optimizers_of("TorchStep", optimizers)
        self.clip_grad_norm = clip_grad_norm
        self.schedules: list[Scheduler] = _schedules(schedules, self.optimizers)
        self.weighting = weighting
        self.metrics: dict[str, dict[str, Metric]] = _training_metrics(metrics, self.objectives)
        """Training metrics, by objective and name."""
        self.engines = [module for module in model.modules() if isinstance(module, EmbeddingEngine)]
        self.updates = 0
        """How many were done."""
        self.observer: Observer = NoObserver()
        self._dtype: torch.dtype = getattr(torch, precision)
        self._device = _device_of(model, self.engines)
        self._scaler = torch.amp.GradScaler(self._device, init_scale=loss_scale, enabled=precision == "float16")
        frozen = modules_of("TorchStep", "freeze", freeze, "freeze=[model.tower]")
        self._left_alone = list({id(p): p for module in frozen for p in module.parameters()}.values())
        self._sync = GradientSync([module for _, module in self._modules()], self.optimizers.values())
        self._synchronised = False
        self._expected: Sequence[Sequence[int]] | None = None
        if weighting is not None:
            _refuse_weighting(weighting, self.optimizers, self.objectives)
        self._fits_optimizers()
        self._asleep = [p for p in self._named_parameters().values() if not p.requires_grad]
        self._looked_at = self._rehearsed = False
        self._to_rehearse: Metrics = {}
        self._logged: dict[str, list[Tensor]] = {}
        self._predicts = False
        self._held: tuple[object, list[nn.Parameter]] | None = None
        self.parts()  # which refuses names that come twice
        for module in modules_of("TorchStep", "compile", compile, "compile=[model.tower]"):
            _compile(module)

    def synchronise(self) -> None:
        """Copy rank 0's parameters and buffers, except those of DistributedDataParallel or FSDP.

        All ranks call it together. From then on each update takes the mean gradient over the samples of all ranks.

        Raises:
            ValueError: The ranks' towers have parameters of other names, shapes or dtypes.
        """
        distributed.mark_gradients_averaged()
        if distributed.world_size() > 1:
            self._sync.broadcast()
        self._synchronised = True

    def expect(self, rows: Sequence[Sequence[int]]) -> None:
        """Receives the rows of each rank in each batch of the next update."""
        self._expected = rows

    def _share(self, number: int, expected: Sequence[Sequence[int]] | None) -> float:
        """Return this rank's share of the samples of a batch, as its tables count it."""
        shared = [engine for engine in self.engines if engine.group is not None]
        if shared:
            return shared[0].share
        if expected is None:
            return 1 / distributed.world_size()
        return expected[number][distributed.rank()] / max(sum(expected[number]), 1)

    def __call__(self, *batches: Batch) -> dict[str, Any]:
        """Does one update from the mean gradient over the rows of the batches of all ranks.

        Returns:
            ``loss``; ``loss/NAME`` and, where it changes, ``weight/NAME`` by objective; ``grad_norm`` if it is clipped;
            what :meth:`log` was given; and the metrics of training.

        Raises:
            KeyError: If a batch lacks a label column, or the model does not give an objective.
            TypeError: If the loss is no tensor, or it is not clear what metrics are of.
            ValueError: If labels do not fit the outputs or the metrics, the loss is not one number, parameters that are
                in no optimizer take gradients since the last evaluation, or there are no optimizers.
        """
        if not self.optimizers:
            raise ValueError("TorchStep: it was built without optimizers, and only predicts; give it optimizers")
        self.model.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        for batch in batches:
            refuse_no_batch("TorchStep", batch)
        several, expected, self._expected = distributed.world_size() > 1, self._expected, None
        if several and not self._synchronised:
            self.synchronise()
        self._sync.clear()
        mine = [batch_size(batch) for batch in batches]
        rows = [sum(each) for each in expected] if expected else mine
        watched: dict[str, Tensor] = {}
        with self._freezing():
            for number, (batch, own) in enumerate(zip(batches, rows, strict=True)):
                share = own / max(sum(rows), 1)
                # Beside others a batch without rows tells nothing: means over its rows are 0/0.
                counts, logged = mine[number] > 0 or sum(mine) == 0, self._logged
                if not counts:
                    self._logged = {}
                with self.observer.phase("towers"):
                    loss, seen = self._forward(batch)
                    if counts or several:  # other ranks may wait for this one's tables
                        self.observer.backward("before")
                        self._scaler.scale(loss if len(batches) == 1 else loss * share).backward()
                        self.observer.backward("after")
                    if several:
                        self._sync.add(self._share(number, expected))
                if not counts:
                    self._logged = logged
                    continue
                for name, value in seen.items():
                    part = value if len(batches) == 1 else value * (mine[number] / max(sum(mine), 1))
                    watched[name] = watched[name] + part if name in watched else part
            self._look()
            with self.observer.phase("update"):
                watched |= self._update()
        return {**watched, **self._take_logged()}

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a figure of training, from a loss, a model or a callback.

        The log has its mean over the steps since the last line, without waiting for the device. What is logged while
        the step predicts is left out. Metrics are not logged, but given by ``metrics``.

        Args:
            name: In the log; not one of the log's own names.
            value: A number, or a tensor of one number.

        Raises:
            TypeError: If it is neither.
            ValueError: If it has more elements than one, or the log uses the name itself.

        Example:
            >>> def loss(outputs, labels):
            ...     step.log("mean_output", outputs.mean())
            ...     return torch.nn.functional.binary_cross_entropy_with_logits(outputs, labels)
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"TorchStep.log: name must be a name, got {name!r}")
        if is_reserved(name):
            raise ValueError(f"TorchStep.log: the log uses {name!r} itself, as it does {list(RESERVED)}; take another")
        if self._predicts:
            return
        if isinstance(value, Metric):
            raise TypeError(
                f"TorchStep.log: the value of {name!r} must be a number, got {described(value)}; give it to the step "
                f"as TorchStep(metrics={{{name!r}: {type(value).__name__}()}}), which updates it"
            )
        if not isinstance(value, Tensor):
            refuse_no_number("TorchStep.log", f"the value of {name!r}", value)
            value = torch.tensor(float(value))
        if value.numel() != 1:
            raise ValueError(
                f"TorchStep.log: the value of {name!r} must be one number, got shape {list(value.shape)}; take its mean"
            )
        self._logged.setdefault(name, []).append(value.detach().reshape(()).float().clone())

    def rehearse(self, metrics: Metrics) -> None:
        """Try metrics of evaluations on the first training batch, so that unsuitable labels fail there.

        Args:
            metrics: By name, for each objective; or by objective and name. Those of other objectives are left out.
        """
        self._to_rehearse, self._rehearsed = metrics, False

    def prefetch(self, batch: Batch) -> None:
        """Begins to send the ids of a batch that comes later to the ranks that own them, where several share tables."""
        for engine in self.engines:
            engine.train()  # as it will be when the batch's turn comes
            engine.prefetch(batch)

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        answer, mask = self._answer(batch), model_outputs.row_mask(batch)
        losses = {name: self._loss(name, answer[name], batch, mask) for name in self.objectives}
        self._measure(answer, batch, mask)
        if self.weighting is not None:
            total, weights = self.weighting(losses), dict(self.weighting.weights())
        else:
            factors = {name: objective.weight_at(self.updates) for name, objective in self.objectives.items()}
            parts = [loss if factors[name] == 1 else factors[name] * loss for name, loss in losses.items()]
            total = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
            weights = {n: torch.tensor(w) for n, w in factors.items() if callable(self.objectives[n].weight)}
        watched = {"loss": total.detach()}
        if list(losses) != [""]:
            watched |= {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        return total, watched | {f"weight/{name}".removesuffix("/"): weight for name, weight in weights.items()}

    def _loss(self, name: str, answer: _Answer, batch: Batch, mask: Tensor | None) -> Tensor:
        objective, outputs = self.objectives[name], answer.outputs
        if objective.loss is None:
            assert answer.loss is not None
            main = None if outputs is None else model_outputs.main_output(outputs)
            if main is not None and main.dim() > 0 and main.shape[0] == 0:
                return main.sum()  # the model's own mean over no rows is not a number
            return model_outputs.checked_loss(answer.loss, None)
        outputs = model_outputs.kept(outputs, mask)
        main = model_outputs.main_output(outputs)
        if main is not None and main.shape[0] == 0:
            return main.sum()  # all rows only fill the batch up, or this rank has none
        labels = None
        if objective.label is not None:
            column = model_outputs.kept(column_of(batch, objective.label), mask)
            labels = model_outputs.aligned(outputs, column)
            model_outputs.refuse_unfit(objective.loss, outputs, labels, objective.label, first=not self._looked_at)
        try:
            loss = objective.loss(outputs, labels) if labels is not None else objective.loss(outputs)
        except Exception as error:
            error.add_note(model_outputs.shape_note(outputs, labels, objective.label))
            raise
        return model_outputs.checked_loss(loss, objective.label)

    def _answer(self, batch: Batch) -> dict[str, _Answer]:
        """Return the model's outputs for a batch, by objective."""
        with torch.autocast(self._device, self._dtype, enabled=self._dtype is not torch.float32):
            returned = self.model(batch)
        if list(self.objectives) == [""]:
            loss, outputs = model_outputs.own_loss(returned) if self.objectives[""].loss is None else (None, returned)
            return {"": _Answer(_floating(outputs), loss)}
        if not isinstance(returned, Mapping):
            raise KeyError(
                f"TorchStep: there are objectives {list(self.objectives)}, and the model must return a dict with an "
                f"output for each, got {described(returned)}"
            )
        missing = [name for name in self.objectives if name not in returned]
        if missing:
            raise KeyError(f"TorchStep: the model gives {sorted(returned)}, and there are objectives {missing} beside")
        return {name: _Answer(_floating(returned[name]), None) for name in self.objectives}

    def _scores(self, name: str, outputs: Any, mask: Tensor | None) -> tuple[Any, Tensor]:
        """Return the outputs without padding rows, and the scores."""
        objective = self.objectives[name]
        where = "TorchStep" if name == "" else f"TorchStep: objective {name!r}"
        if outputs is None:
            raise TypeError(f"{where}: the model returns a loss without outputs, and there is nothing to evaluate")
        outputs = model_outputs.kept(outputs, mask)
        return outputs, model_outputs.scores_of(outputs, objective.link, objective.loss, where)

    def _scored(self, name: str, outputs: Any, batch: Batch, mask: Tensor | None, *, training: bool) -> Scored:
        objective = self.objectives[name]
        outputs, scores = self._scores(name, outputs, mask)
        labels = groups = None
        if objective.label is not None:
            column = column_of(batch, objective.label)
            labels = model_outputs.one_a_row(model_outputs.aligned(outputs, model_outputs.kept(column, mask)))
        if objective.groups is not None and not (training and objective.groups not in batch):
            groups = model_outputs.one_a_row(model_outputs.kept(column_of(batch, objective.groups, "group"), mask))
        return Scored(scores, labels, groups)

    def _measure(self, answer: Mapping[str, _Answer], batch: Batch, mask: Tensor | None) -> None:
        """Update the metrics of training and, in the first batch, tries those of evaluations."""
        if batch_size(batch) == 0:  # other ranks alone have data left
            return
        tried = {} if self._rehearsed else by_objective(self._to_rehearse, list(self.objectives), others="ignore")
        self._rehearsed = True
        with torch.no_grad():
            for name in self.objectives:
                if self.metrics.get(name) or tried.get(name):
                    scored = self._scored(name, answer[name].outputs, batch, mask, training=True)
                    rehearse(tried.get(name, {}), scored)
                    for metric_name, metric in self.metrics.get(name, {}).items():
                        update(metric_name, metric, scored)

    def _take_logged(self) -> dict[str, Tensor | Metric]:
        logged, self._logged = self._logged, {}
        several = list(self.objectives) != [""]
        named = {
            f"{objective}.{name}" if several else name: metric
            for objective, metrics in self.metrics.items()
            for name, metric in metrics.items()
        }
        means = {name: found[0] if len(found) == 1 else torch.stack(found).mean() for name, found in logged.items()}
        return {**named, **means}

    def _look(self) -> None:
        """Checks, after the first backward pass since an evaluation, that parameters with gradients have optimizers."""
        if not self._looked_at or any(parameter.requires_grad for parameter in self._asleep):
            self._fits_optimizers()
            self._asleep = [p for p in self._named_parameters().values() if not p.requires_grad]
            self._looked_at = True

    def _fits_optimizers(self) -> None:
        if self.optimizers:
            refuse_untrained(self._named_parameters(), self.optimizers, {id(p) for p in self._left_alone})

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return named_parameters(self._modules())

    def _modules(self) -> list[tuple[str, nn.Module]]:
        """Return all modules that may have parameters, with the prefixes of their names."""
        losses = [(n, o.loss) for n, o in self.objectives.items() if isinstance(o.loss, nn.Module)]
        learnt = [] if self.weighting is None else [("weighting.", self.weighting)]
        return [("", self.model), *learnt, *((f"loss.{n}".rstrip(".") + ".", module) for n, module in losses)]

    @contextmanager
    def _freezing(self) -> Iterator[None]:
        """Disables gradients of the parameters that another step trains."""
        awake = [parameter for parameter in self._left_alone if parameter.requires_grad]
        for parameter in awake:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in awake:
                parameter.requires_grad_(True)

    def _update(self) -> dict[str, Tensor]:
        norm = {}
        if distributed.world_size() > 1:
            with self.observer.phase("exchange"):
                self._sync.finish()
        if self.clip_grad_norm is not None:
            if self._scaler.is_enabled():
                for optimizer in self.optimizers.values():
                    self._scaler.unscale_(optimizer)
            found = nn.utils.clip_grad_norm_(self._trained(), self.clip_grad_norm)
            # Of an update that overflows and is left out there is no norm to average.
            if not self._scaler.is_enabled() or bool(found.isfinite()):
                norm["grad_norm"] = found
        scaled = []
        if self._scaler.is_enabled():
            optimizers = list(self.optimizers.values())
            has = [_has_gradients(optimizer) for optimizer in optimizers]
            if distributed.world_size() > 1:
                has = unscaled_together(self._scaler, optimizers, has)
            scaled = [optimizer for optimizer, there in zip(optimizers, has, strict=True) if there]
        for optimizer in self.optimizers.values():
            if optimizer in scaled:
                self._scaler.step(optimizer)
            else:  # the scaler takes no optimizer without gradients, as one of frozen towers
                optimizer.step()
        if scaled:
            self._scaler.update()
        if self._scaler.is_enabled():
            # Row gradients of an update that was left out would keep their rows from being evicted.
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        self.updates += 1
        return norm

    def _trained(self) -> list[nn.Parameter]:
        """Return the parameters of the optimizers; others may hold gradients of another step."""
        groups = tuple((id(g), len(g["params"])) for o in self.optimizers.values() for g in o.param_groups)
        if self._held is None or self._held[0] != groups:
            held = {id(parameter) for optimizer in self.optimizers.values() for parameter in held_by(optimizer)}
            self._held = groups, [p for p in self._named_parameters().values() if id(p) in held]
        return self._held[1]

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Return the scores for metrics, by objective; the batch needs no labels.

        The model stays in evaluation mode, and tables insert nothing.

        Returns:
            ``[B]`` each, of the rows that do not only fill the batch up.
        """
        with self._predicting():
            answer, mask = self._answer(batch), model_outputs.row_mask(batch)
            return {name: self._scores(name, answer[name].outputs, mask)[1] for name in self.objectives}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Scored]:
        """Return scores, labels and groups by objective.

        The model stays in evaluation mode, and tables insert nothing.

        Raises:
            KeyError: If the batch lacks a column of labels or groups.
            TypeError: If it is not clear which of the model's outputs the scores are of.
        """
        with self._predicting():
            answer, mask = self._answer(batch), model_outputs.row_mask(batch)
            return {n: self._scored(n, answer[n].outputs, batch, mask, training=False) for n in self.objectives}

    @contextmanager
    def _predicting(self) -> Iterator[None]:
        self.model.eval()
        self._looked_at, self._predicts = False, True
        try:
            yield
        finally:
            self._predicts = False

    def parts(self) -> dict[str, object]:
        """Return engines, model, optimizers, schedules and scale, by name."""
        model = unwrapped(self.model)
        named = [name for name, module in model.named_modules() if isinstance(module, EmbeddingEngine)]
        names = ["engine"] if len(named) == 1 else [f"engine.{name}" for name in without_wrappers(model, named)]
        engines = {name: model.get_submodule(path) for name, path in zip(names, named, strict=True)}
        parts: dict[str, object] = {"updates": self, **engines}
        if model not in self.engines:
            parts["model"] = model
        parts |= {f"schedule{number}": schedule for number, schedule in enumerate(self.schedules)}
        if self.weighting is not None:
            parts["weighting"] = self.weighting
        for name, objective in self.objectives.items():
            if isinstance(objective.loss, nn.Module) and objective.loss.state_dict():
                parts[f"loss.{name}".rstrip(".")] = objective.loss
        if self._scaler.is_enabled():
            parts["scaler"] = self._scaler
        if taken := sorted(parts.keys() & self.optimizers.keys()):
            raise ValueError(
                f"TorchStep: checkpoints have other parts by the names {taken}; call the optimizers otherwise, as "
                f"{{'dense': dense, 'sparse': sparse}}"
            )
        return parts | self.optimizers

    def state_dict(self) -> dict[str, Any]:
        """Return how many updates were done."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.updates = state_dict["updates"]


def _compile(module: nn.Module) -> None:
    """Compile a module in place, also containers such as Sequential, whose ``compile()`` compiles nothing."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call)


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    # All of them are read, in one order: on several ranks, reading that of a table is for all ranks together.
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return any(gradient is not None for gradient in gradients)


def _floating(outputs: Any) -> Any:
    """Return outputs for losses: in float32, with at least one row."""
    if not isinstance(outputs, Tensor):
        return model_outputs.in_float32(outputs)
    # A model that squeezes its outputs leaves no axis of a batch of one row.
    return outputs.float().reshape(1) if outputs.dim() == 0 else outputs.float()


def _device_of(model: nn.Module, engines: Sequence[EmbeddingEngine]) -> str:
    tensors = [engine.device.type for engine in engines] + [parameter.device.type for parameter in model.parameters()]
    return tensors[0] if tensors else "cpu"


def _objectives(loss: Any, label: str | None, groups: str | None) -> dict[str, Objective]:
    if isinstance(loss, Mapping):
        for name, objective in loss.items():
            refuse_other_than("TorchStep", f"loss[{name!r}]", objective, Objective, "an Objective")
            if objective.loss is None and (name, len(loss)) != ("", 1):
                raise ValueError(
                    f"TorchStep: the objective {name!r} has no loss; only TorchStep(loss=None) takes the model's own"
                )
        if not loss:
            raise ValueError("TorchStep: loss must have at least one objective, got an empty mapping")
        return dict(loss)
    if isinstance(loss, Objective):
        return {"": loss}
    refuse_no_name("TorchStep", "label", label)
    refuse_no_name("TorchStep", "groups", groups)
    if loss is not None and (isinstance(loss, type) or not callable(loss)):
        raise TypeError(
            f"TorchStep: loss must be a function (outputs, labels) → scalar, as "
            f"torch.nn.functional.binary_cross_entropy_with_logits, an Objective, objectives by name, or None where "
            f"the model returns its loss, got {described(loss)}"
        )
    return {"": Objective(loss=loss, label=label, groups=groups)}


def _schedules(schedules: Any, optimizers: Mapping[str, torch.optim.Optimizer]) -> list[Scheduler]:
    expected = "a sequence of schedules, as schedules=[torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]"
    if not isinstance(schedules, Iterable) or isinstance(schedules, str | Mapping):
        hint = "; put it into a list" if hasattr(schedules, "step") else ""
        raise TypeError(f"TorchStep: schedules must be {expected}, got {described(schedules)}{hint}")
    given = list(schedules)
    held = {id(parameter) for optimizer in optimizers.values() for parameter in held_by(optimizer)}
    for number, schedule in enumerate(given):
        where = f"TorchStep: schedules[{number}]"
        if isinstance(schedule, ReduceLROnPlateau):
            raise ValueError(
                f"{where}: ReduceLROnPlateau waits for a metric, which a step has not; leave it to "
                f"Trainer(callbacks=[PlateauSchedule('eval/auc', [schedule])]), with mode='max' for a metric that grows"
            )
        methods = ("step", "state_dict", "load_state_dict")
        if isinstance(schedule, type | torch.optim.Optimizer) or not all(hasattr(schedule, m) for m in methods):
            hint = "; make it one by LrSchedule(optimizer, function)" if callable(schedule) else ""
            raise TypeError(f"{where} must be a schedule of torch's, or an LrSchedule, got {described(schedule)}{hint}")
        own = getattr(schedule, "optimizer", None)
        if isinstance(own, torch.optim.Optimizer) and not any(id(p) in held for p in held_by(own)):
            raise ValueError(f"{where} is of an optimizer that the step has not; give it to the step that has it")
    return given


def _training_metrics(metrics: Metrics | None, objectives: Mapping[str, Objective]) -> dict[str, dict[str, Metric]]:
    if not metrics:
        return {}
    nested = by_objective(metrics, list(objectives), where="TorchStep")
    for objective, of in nested.items():
        for name in of:
            if is_reserved(name):
                raise ValueError(f"TorchStep: the log uses {name!r} itself; give the metric another name")
            if objectives[objective].label is None:
                raise ValueError(f"TorchStep: the metric {name!r} needs labels; give label=, the column that has them")
            if of[name].takes_groups and objectives[objective].groups is None:
                raise ValueError(f"TorchStep: the metric {name!r} is by group; give groups=, the column that has them")
    return nested


def _refuse_weighting(
    weighting: UncertaintyWeights,
    optimizers: Mapping[str, torch.optim.Optimizer],
    objectives: Mapping[str, Objective],
) -> None:
    refuse_other_than("TorchStep", "weighting", weighting, nn.Module, "UncertaintyWeights of the objectives' names")
    held = {id(parameter) for optimizer in optimizers.values() for parameter in held_by(optimizer)}
    if optimizers and any(id(parameter) not in held for parameter in weighting.parameters()):
        raise ValueError(
            "TorchStep: the parameters of weighting are in no optimizer; add weighting.parameters() to a dense one"
        )
    if set(weighting.names) != set(objectives):
        raise ValueError(f"TorchStep: weighting is of {weighting.names}, and the objectives are {list(objectives)}")
