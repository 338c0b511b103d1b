"""TorchStep: forward, backward and update of a torch module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from recis_hybrid import distributed
from recis_hybrid.embedding import EmbeddingEngine, exchange_gradients
from recis_hybrid.metrics import Metric
from recis_hybrid.pipelines.arguments import (
    Trainable,
    check_batch,
    check_modules,
    check_optimizers,
    check_parameters,
    parameters_in,
)
from recis_hybrid.pipelines.metrics_record import RESERVED, is_reserved
from recis_hybrid.pipelines.steps import model_outputs
from recis_hybrid.pipelines.steps.gradient_guard import GradientGuard
from recis_hybrid.pipelines.steps.gradient_sync import GradientSync, unscale_together
from recis_hybrid.pipelines.steps.metrics import Metrics, by_objective, training_metrics, try_metrics, update_metric
from recis_hybrid.pipelines.steps.objective import (
    Loss,
    Objective,
    UncertaintyWeights,
    check_weighting,
    objectives_of,
)
from recis_hybrid.pipelines.steps.schedules import Scheduler, check_schedules
from recis_hybrid.pipelines.steps.step import (
    NoObserver,
    Observer,
    Predictions,
    dense_column,
)
from recis_hybrid.pipelines.steps.trainable import check_trained, named_parameters, parameters_of
from recis_hybrid.ragged import Batch, batch_size
from recis_hybrid.saver.parts.module_names import unwrapped, without_wrappers
from recis_hybrid.validation import check_choice, check_flag, check_number, check_type, describe_value

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, eq=False)
class _Outputs:
    """The model's outputs for an objective."""

    values: Any
    loss: Tensor | None
    """The loss that the model returned."""


class TorchStep:
    """Forward, backward and update of a torch module, for one objective or several.

    Every parameter that requires gradients, and every table, must have exactly one optimizer. Everything else must be
    frozen explicitly with ``requires_grad_(False)``, ``EmbeddingConfig(trainable=False)``, or ``freeze``.

    Labels of any dtype, ``[B]`` or ``[B, 1]``, are converted to the shape and dtype of the outputs. Integer labels for
    outputs ``[B, K]`` remain classes. Padding rows, where the bool column ``mask`` of a batch is False (added by
    ``ShardOptions(uneven="pad")``), count neither in losses nor in predictions. A model that returns its own loss must
    mask them itself.

    Args:
        model: Batch → outputs ``[B]``, by objective if there are several. Any return value, such as a tuple or a dict,
            is passed to the loss function. Metrics then use its ``logits``, or the first tensor of a tuple, unless
            ``Objective(link=)`` is set.
        loss: (outputs, labels) → scalar; an Objective; or objectives by name. None: the model returns its own loss, as
            ``loss``, ``(loss, outputs)``, or a dict or object with ``loss`` and ``logits``.
        optimizers: Dense and sparse optimizers: a mapping by the names under which they are saved, or a sequence. A
            step without optimizers only predicts.
        label: Column of labels, if ``loss`` is a function or None. None: there are no labels, ``loss`` takes only the
            outputs, and evaluation is impossible.
        groups: Column of groups for metrics by group, int64 ``[B]``, if ``loss`` is a function or None.
        precision: Precision of the towers (autocast). JAX towers of ``hf_tower`` follow it, whereas the function of any
            other JaxTower determines its own dtypes. With float16, losses are scaled and an update is skipped if
            gradients, including row gradients, overflow, which synchronizes the device in each step.
        clip_grad_norm: Maximum global norm of all gradients, including those of tables; None: no clipping.
        schedules: Learning-rate schedules, stepped after each update.
        weighting: Learns the weights of the objectives, whose own weights are then ignored.
        compile: Modules, usually towers, to compile in place with ``torch.compile``.
        loss_scale: Initial loss scale for float16.
        freeze: Modules and parameters of the model that this step does not train because another step does. They
            require no gradients while the step runs. Under DistributedDataParallel, wrap them separately.
        metrics: Training metrics: by name, for every objective; or by objective and name. They are updated with each
            training batch, and Trainer computes and resets them for each record of the log. :class:`AUC` keeps all
            rows in between, :class:`BinnedAUC` only counts.
        check_gradients: Check all gradients before each update, and raise an error that names tables, features and ids,
            or parameters, if some are not finite. Synchronizes the device in each step. With float16, where overflows
            are part of loss scaling, gradients are only checked once the loss scale has fallen to 1.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The precision is unknown, a parameter or table has no optimizer or more than one, an optimizer has
            parameters outside the model or the name of another part of checkpoints, or a schedule needs a metric.
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
        freeze: Iterable[Trainable] = (),
        metrics: Metrics | None = None,
        check_gradients: bool = False,
    ) -> None:
        check_flag("TorchStep", "check_gradients", check_gradients)
        check_choice("TorchStep", "precision", precision, get_args(Precision))
        expected = "a torch.nn.Module, the first argument of TorchStep(model, loss, [...])"
        check_type("TorchStep", "model", model, nn.Module, expected)
        if type(model).__module__ == "torch.nn.modules.loss":
            raise TypeError(
                f"TorchStep: model must not be a loss, got {describe_value(model)}; write TorchStep(model, loss, [...])"
            )
        for name, value in (("clip_grad_norm", clip_grad_norm), ("loss_scale", loss_scale)):
            if value is not None:
                check_number("TorchStep", name, value)
                if not value > 0:
                    raise ValueError(f"TorchStep: {name} must be above 0, got {value}")
        self.model = model
        self.objectives: dict[str, Objective] = objectives_of("TorchStep", loss, label, groups)
        self.optimizers: dict[str, torch.optim.Optimizer] = check_optimizers("TorchStep", optimizers)
        self.clip_grad_norm = clip_grad_norm
        self.schedules: list[Scheduler] = check_schedules("TorchStep", schedules, self.optimizers)
        self.weighting = weighting
        self.metrics: dict[str, dict[str, Metric]] = training_metrics("TorchStep", metrics, self.objectives)
        """Training metrics, by objective and name."""
        self.engines = [module for module in model.modules() if isinstance(module, EmbeddingEngine)]
        self.updates = 0
        """Number of completed updates."""
        self.observer: Observer = NoObserver()
        self._dtype: torch.dtype = getattr(torch, precision)
        self._device = _device_of(model, self.engines)
        self._scaler = torch.amp.GradScaler(self._device, init_scale=loss_scale, enabled=precision == "float16")
        self._frozen = parameters_in(check_parameters("TorchStep", "freeze", freeze, "freeze=[model.tower]"))
        self._is_synchronized = False
        self._expected_rows: Sequence[Sequence[int]] | None = None
        self._prefetching: list[EmbeddingEngine] | None = None
        """Engines that read columns of the batches; None until the first update."""
        if weighting is not None:
            check_weighting("TorchStep", weighting, self.optimizers, self.objectives)
        self._guard = GradientGuard(self.engines) if check_gradients else None
        self._sync = GradientSync([module for _, module in self._modules()], self.optimizers.values())
        self._check_trained()
        self._without_gradients = [p for p in self._named_parameters().values() if not p.requires_grad]
        # Whether parameters and labels have been checked since the last evaluation, and evaluation metrics tried.
        self._is_checked = self._is_rehearsed = False
        self._evaluation_metrics: Metrics = {}
        self._log: dict[str, list[Tensor]] = {}
        self._predicts = False
        self._trained_parameters: tuple[object, list[nn.Parameter]] | None = None
        self.parts()  # raises if names are duplicate
        for module in check_modules("TorchStep", "compile", compile, "compile=[model.tower]"):
            _compile(module)

    def __repr__(self) -> str:
        optimizers = ", ".join(f"{name}: {type(each).__name__}" for name, each in self.optimizers.items())
        objectives = "" if list(self.objectives) == [""] else f", objectives={list(self.objectives)}"
        return (
            f"TorchStep({type(self.model).__name__}{objectives}, optimizers=[{optimizers}], "
            f"engines={len(self.engines)}, precision={str(self._dtype).removeprefix('torch.')}, updates={self.updates})"
        )

    def synchronize(self) -> None:
        """Copy rank 0's parameters and buffers to all ranks; collective.

        Modules wrapped in DistributedDataParallel or FSDP are skipped. From then on, each update applies the mean
        gradient over the samples of all ranks.

        Raises:
            ValueError: The names, shapes or dtypes of parameters differ between ranks.
        """
        distributed.mark_gradients_averaged()
        if distributed.world_size() > 1:
            self._sync.broadcast()
        self._is_synchronized = True

    def expect(self, rows: Sequence[Sequence[int]]) -> None:
        """Receive the number of rows on each rank for each batch of the next update."""
        self._expected_rows = rows

    def _share(self, number: int, expected: Sequence[Sequence[int]] | None) -> float:
        """Return this rank's share of the samples of a batch, the same that its tables use."""
        shared = [engine for engine in self.engines if engine.group is not None]
        if shared:
            return shared[0].share
        if expected is None:
            return 1 / distributed.world_size()
        return expected[number][distributed.rank()] / max(sum(expected[number]), 1)

    def __call__(self, *batches: Batch) -> dict[str, Any]:
        """Do one update with the mean gradient over the rows of the batches of all ranks.

        Returns:
            ``loss``; by objective ``loss/NAME`` and, if the weight is variable, ``weight/NAME``; ``grad_norm`` if it is
            clipped; the values of :meth:`log`; and the training metrics.

        Raises:
            KeyError: A batch lacks a label column, or the model returns no output for an objective.
            TypeError: The loss is not a tensor, or the output for metrics is ambiguous.
            NonFiniteGradientError: With ``check_gradients``, a gradient is not finite; nothing is updated.
            ValueError: Labels do not fit the outputs or the metrics, the loss is not a scalar, parameters without an
                optimizer require gradients since the last evaluation, or there are no optimizers.
        """
        if not self.optimizers:
            raise ValueError("TorchStep: a step without optimizers only predicts; pass optimizers to train")
        self.model.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        for batch in batches:
            check_batch("TorchStep", batch)
        several, expected, self._expected_rows = distributed.world_size() > 1, self._expected_rows, None
        if several and not self._is_synchronized:
            self.synchronize()
        self._sync.clear()
        own = [batch_size(batch) for batch in batches]
        rows = [sum(each) for each in expected] if expected else own
        figures: dict[str, Tensor] = {}
        with self._freezing(), nullcontext() if self._guard is None else self._guard.watching():
            for number, (batch, count) in enumerate(zip(batches, rows, strict=True)):
                share = count / max(sum(rows), 1)
                # An empty batch among others adds no figures, because means over no rows are NaN.
                adds_figures, log = own[number] > 0 or sum(own) == 0, self._log
                if not adds_figures:
                    self._log = {}
                with self.observer.phase("towers"):
                    loss, batch_figures = self._forward(batch)
                    if adds_figures or several:  # other ranks may wait for this one's tables
                        self.observer.backward("before")
                        self._scaler.scale(loss if len(batches) == 1 else loss * share).backward()
                        self.observer.backward("after")
                    if several:
                        self._sync.add(self._share(number, expected))
                if not adds_figures:
                    self._log = log
                    continue
                for name, value in batch_figures.items():
                    part = value if len(batches) == 1 else value * (own[number] / max(sum(own), 1))
                    figures[name] = figures[name] + part if name in figures else part
            if self._prefetching is None:
                self._prefetching = [engine for engine in self.engines if engine.has_read(batches[-1])]
            self._check_new_parameters()
            with self.observer.phase("update"):
                figures |= self._update(figures.get("loss"), batches)
        return {**figures, **self._take_log()}

    def log(self, name: str, value: float | Tensor) -> None:
        """Log a figure of the training from a loss, a model or a callback.

        The log shows the mean over the steps since the last record. Logging does not synchronize the device. Calls
        while the step predicts are ignored. Pass metrics as ``metrics`` to the constructor instead.

        Args:
            name: Name in the log; must not be one that the log uses itself.
            value: A number or a scalar tensor.

        Raises:
            TypeError: The value is neither.
            ValueError: The value has more than one element, or the log uses the name itself.

        Example:
            >>> def loss(outputs, labels):
            ...     step.log("mean_output", outputs.mean())
            ...     return torch.nn.functional.binary_cross_entropy_with_logits(outputs, labels)
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"TorchStep.log: name must be a non-empty string, got {name!r}")
        if is_reserved(name):
            raise ValueError(f"TorchStep.log: the log uses {name!r} itself; choose a name other than {list(RESERVED)}")
        if self._predicts:
            return
        if isinstance(value, Metric):
            raise TypeError(
                f"TorchStep.log: the value of {name!r} must be a number, got {describe_value(value)}; pass it as "
                f"TorchStep(metrics={{{name!r}: {type(value).__name__}()}}), and the step updates it"
            )
        if not isinstance(value, Tensor):
            check_number("TorchStep.log", f"the value of {name!r}", value)
            value = torch.tensor(float(value))
        if value.numel() != 1:
            raise ValueError(
                f"TorchStep.log: the value of {name!r} must be a scalar, got shape {list(value.shape)}; take its mean"
            )
        self._log.setdefault(name, []).append(value.detach().reshape(()).float().clone())

    def rehearse(self, metrics: Metrics) -> None:
        """Try evaluation metrics on the first training batch, so that unsuitable labels fail early.

        Args:
            metrics: By name, for every objective; or by objective and name. Those of unknown objectives are ignored.
        """
        self._evaluation_metrics, self._is_rehearsed = metrics, False

    def prefetch(self, batch: Batch) -> None:
        """Start sending the ids of a later batch to the ranks that own them, if several ranks share the tables.

        Nothing is sent before the first update, which shows which engines read columns of the batches and which read
        columns that the model computes.
        """
        for engine in self._prefetching or ():
            engine.train()  # the mode in which the batch will be looked up
            engine.prefetch(batch)

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, mask = self._outputs(batch), model_outputs.row_mask(batch)
        losses = {name: self._loss(name, outputs[name], batch, mask) for name in self.objectives}
        self._update_metrics(outputs, batch, mask)
        if self.weighting is not None:
            total, weights = self.weighting(losses), dict(self.weighting.weights())
        else:
            factors = {name: objective.weight_at(self.updates) for name, objective in self.objectives.items()}
            parts = [loss if factors[name] == 1 else factors[name] * loss for name, loss in losses.items()]
            total = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
            weights = {n: torch.tensor(w) for n, w in factors.items() if callable(self.objectives[n].weight)}
        figures = {"loss": total.detach()}
        if list(losses) != [""]:
            figures |= {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        return total, figures | {f"weight/{name}".removesuffix("/"): weight for name, weight in weights.items()}

    def _loss(self, name: str, outputs: _Outputs, batch: Batch, mask: Tensor | None) -> Tensor:
        objective, values = self.objectives[name], outputs.values
        if objective.loss is None:
            assert outputs.loss is not None
            main = None if values is None else model_outputs.main_output(values)
            if main is not None and main.dim() > 0 and main.shape[0] == 0:
                return main.sum()  # the model's own mean over no rows is NaN
            return model_outputs.checked_loss(outputs.loss, None)
        values = model_outputs.without_padding(values, mask)
        main = model_outputs.main_output(values)
        if main is not None and main.shape[0] == 0:
            return main.sum()  # all rows are padding, or this rank has none
        labels = None
        if objective.label is not None:
            column = model_outputs.without_padding(dense_column(batch, objective.label), mask)
            labels = model_outputs.aligned(values, column)
            model_outputs.check_labels(objective.loss, values, labels, objective.label, first=not self._is_checked)
        try:
            loss = objective.loss(values, labels) if labels is not None else objective.loss(values)
        except Exception as error:
            error.add_note(model_outputs.shape_note(values, labels, objective.label))
            raise
        return model_outputs.checked_loss(loss, objective.label)

    def _outputs(self, batch: Batch) -> dict[str, _Outputs]:
        """Return the model's outputs for a batch, by objective."""
        with torch.autocast(self._device, self._dtype, enabled=self._dtype is not torch.float32):
            returned = self.model(batch)
        if list(self.objectives) == [""]:
            loss, values = model_outputs.own_loss(returned) if self.objectives[""].loss is None else (None, returned)
            return {"": _Outputs(_floating(values), loss)}
        if not isinstance(returned, Mapping):
            raise KeyError(
                f"TorchStep: with the objectives {list(self.objectives)} the model must return a dict with one output "
                f"per objective, got {describe_value(returned)}"
            )
        missing = [name for name in self.objectives if name not in returned]
        if missing:
            raise KeyError(f"TorchStep: the model must also return outputs for {missing}, got {sorted(returned)}")
        return {name: _Outputs(_floating(returned[name]), None) for name in self.objectives}

    def _scores(self, name: str, outputs: Any, mask: Tensor | None) -> tuple[Any, Tensor]:
        """Return the outputs without padding rows, and the scores."""
        objective = self.objectives[name]
        where = "TorchStep" if name == "" else f"TorchStep: objective {name!r}"
        if outputs is None:
            raise TypeError(f"{where}: the model must return outputs to be evaluated, got only a loss")
        outputs = model_outputs.without_padding(outputs, mask)
        return outputs, model_outputs.scores_of(outputs, objective.link, objective.loss, where)

    def _predictions(
        self, name: str, outputs: Any, batch: Batch, mask: Tensor | None, *, training: bool
    ) -> Predictions:
        objective = self.objectives[name]
        outputs, scores = self._scores(name, outputs, mask)
        labels = groups = None
        if objective.label is not None:
            column = model_outputs.without_padding(dense_column(batch, objective.label), mask)
            labels = model_outputs.squeeze_column(model_outputs.aligned(outputs, column))
        if objective.groups is not None and not (training and objective.groups not in batch):
            column = model_outputs.without_padding(dense_column(batch, objective.groups, "group"), mask)
            groups = model_outputs.squeeze_column(column)
        return Predictions(scores, labels, groups)

    def _update_metrics(self, outputs: Mapping[str, _Outputs], batch: Batch, mask: Tensor | None) -> None:
        """Update the training metrics and, on the first batch, try the evaluation metrics."""
        if batch_size(batch) == 0:  # only other ranks have data left
            return
        rehearsal = (
            {} if self._is_rehearsed else by_objective(self._evaluation_metrics, list(self.objectives), others="ignore")
        )
        self._is_rehearsed = True
        with torch.no_grad():
            for name in self.objectives:
                if self.metrics.get(name) or rehearsal.get(name):
                    predictions = self._predictions(name, outputs[name].values, batch, mask, training=True)
                    try_metrics(rehearsal.get(name, {}), predictions)
                    for metric_name, metric in self.metrics.get(name, {}).items():
                        update_metric(metric_name, metric, predictions)

    def _take_log(self) -> dict[str, Tensor | Metric]:
        log, self._log = self._log, {}
        several = list(self.objectives) != [""]
        named = {
            f"{objective}.{name}" if several else name: metric
            for objective, metrics in self.metrics.items()
            for name, metric in metrics.items()
        }
        means = {name: values[0] if len(values) == 1 else torch.stack(values).mean() for name, values in log.items()}
        return {**named, **means}

    def _check_new_parameters(self) -> None:
        """Check optimizers again in the first step after an evaluation, or if frozen parameters are unfrozen."""
        if not self._is_checked or any(parameter.requires_grad for parameter in self._without_gradients):
            self._check_trained()
            self._without_gradients = [p for p in self._named_parameters().values() if not p.requires_grad]
            self._is_checked = True

    def _check_trained(self) -> None:
        if self.optimizers:
            check_trained(self._named_parameters(), self.optimizers, {id(p) for p in self._frozen})

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return named_parameters(self._modules())

    def _modules(self) -> list[tuple[str, nn.Module]]:
        """Return all modules that may have parameters, with the prefixes of their names."""
        losses = [(n, o.loss) for n, o in self.objectives.items() if isinstance(o.loss, nn.Module)]
        weighting = [] if self.weighting is None else [("weighting.", self.weighting)]
        return [("", self.model), *weighting, *((f"loss.{n}".rstrip(".") + ".", module) for n, module in losses)]

    @contextmanager
    def _freezing(self) -> Iterator[None]:
        """Disable gradients of the parameters that another step trains."""
        enabled = [parameter for parameter in self._frozen if parameter.requires_grad]
        for parameter in enabled:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in enabled:
                parameter.requires_grad_(True)

    def _update(self, loss: Tensor | None, batches: Sequence[Batch]) -> dict[str, Tensor]:
        if distributed.world_size() > 1:
            with self.observer.phase("exchange"):
                self._sync.finish()
        if self._guard is not None and not (self._scaler.is_enabled() and self._scaler.get_scale() > 1):
            self._guard.check(self.updates + 1, loss, self._trained(), self._named_parameters, batches)
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        with exchange_gradients([parameter for group in groups for parameter in group["params"]]):
            norm = self._step_optimizers()
        if self._scaler.is_enabled():
            # Row gradients left by a skipped update would protect their rows from eviction.
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
        for schedule in self.schedules:
            schedule.step()
        self.updates += 1
        return norm

    def _step_optimizers(self) -> dict[str, Tensor]:
        """Clip and unscale gradients, let all optimizers step, and return the norm of the gradients, if clipped."""
        norm = {}
        if self.clip_grad_norm is not None:
            if self._scaler.is_enabled():
                for optimizer in self.optimizers.values():
                    self._scaler.unscale_(optimizer)
            total_norm = nn.utils.clip_grad_norm_(self._trained(), self.clip_grad_norm)
            # An update that overflows is skipped and must not enter the mean of norms.
            if not self._scaler.is_enabled() or bool(total_norm.isfinite()):
                norm["grad_norm"] = total_norm
        scaled = []
        if self._scaler.is_enabled():
            optimizers = list(self.optimizers.values())
            has_gradients = [_has_gradients(optimizer) for optimizer in optimizers]
            if distributed.world_size() > 1:
                has_gradients = unscale_together(self._scaler, optimizers, has_gradients)
            scaled = [optimizer for optimizer, has in zip(optimizers, has_gradients, strict=True) if has]
        for optimizer in self.optimizers.values():
            if optimizer in scaled:
                self._scaler.step(optimizer)
            else:  # the scaler raises for an optimizer without gradients, such as that of frozen towers
                optimizer.step()
        if scaled:
            self._scaler.update()
        return norm

    def _trained(self) -> list[nn.Parameter]:
        """Return the optimizers' parameters. Other parameters may have gradients from another step."""
        groups = tuple((id(g), len(g["params"])) for o in self.optimizers.values() for g in o.param_groups)
        if self._trained_parameters is None or self._trained_parameters[0] != groups:
            trained = {id(p) for optimizer in self.optimizers.values() for p in parameters_of(optimizer)}
            self._trained_parameters = groups, [p for p in self._named_parameters().values() if id(p) in trained]
        return self._trained_parameters[1]

    @torch.no_grad()
    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Return the scores for metrics, by objective; the batch needs no labels.

        The model stays in evaluation mode, and tables insert nothing.

        Returns:
            ``[B]`` each, without padding rows.
        """
        with self._predicting():
            outputs, mask = self._outputs(batch), model_outputs.row_mask(batch)
            return {name: self._scores(name, outputs[name].values, mask)[1] for name in self.objectives}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Predictions]:
        """Return scores, labels and groups by objective.

        The model stays in evaluation mode, and tables insert nothing.

        Raises:
            KeyError: The batch lacks a column of labels or groups.
            TypeError: The output for the scores is ambiguous.
        """
        with self._predicting():
            outputs, mask = self._outputs(batch), model_outputs.row_mask(batch)
            return {n: self._predictions(n, outputs[n].values, batch, mask, training=False) for n in self.objectives}

    @contextmanager
    def _predicting(self) -> Iterator[None]:
        self.model.eval()
        self._is_checked, self._predicts = False, True
        try:
            yield
        finally:
            self._predicts = False

    def parts(self) -> dict[str, object]:
        """Return engines, model, optimizers, schedules and loss scaler by name."""
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
        if duplicates := sorted(parts.keys() & self.optimizers.keys()):
            raise ValueError(
                f"TorchStep: checkpoints use the names {duplicates} for other parts; rename the optimizers, for "
                f"example {{'dense': dense, 'sparse': sparse}}"
            )
        return parts | self.optimizers

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of updates."""
        self.updates = state_dict["updates"]


def _compile(module: nn.Module) -> None:
    """Compile a module in place. Unlike ``Module.compile``, this works for containers such as Sequential."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    module._compiled_call_impl = torch.compile(call)


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    # Read all gradients, in a fixed order: with several ranks, reading the gradient of a table is collective.
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return any(gradient is not None for gradient in gradients)


def _floating(outputs: Any) -> Any:
    """Return outputs in float32, and a scalar output as ``[1]``."""
    if not isinstance(outputs, Tensor):
        return model_outputs.in_float32(outputs)
    # A model that squeezes its outputs drops the batch axis of a single row.
    return outputs.float().reshape(1) if outputs.dim() == 0 else outputs.float()


def _device_of(model: nn.Module, engines: Sequence[EmbeddingEngine]) -> str:
    tensors = [engine.device.type for engine in engines] + [parameter.device.type for parameter in model.parameters()]
    return tensors[0] if tensors else "cpu"
