"""TorchStep: forward, backward and update of a torch module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid import distributed
from recis_hybrid.embedding import EmbeddingEngine
from recis_hybrid.pipelines.gradient_sync import GradientSync, unscaled_together
from recis_hybrid.pipelines.objective import Loss, Objective, UncertaintyWeights
from recis_hybrid.pipelines.step import NoObserver, Observer, Scored, column_of
from recis_hybrid.ragged import Batch, batch_size

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]


class Scheduler(Protocol):
    """A learning-rate schedule: torch's, or :class:`LrSchedule`."""

    def step(self) -> Any:
        """Is called after each update."""

    def state_dict(self) -> dict[str, Any]:
        """Hands out the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Takes the state back."""


class TorchStep:
    """Forward, backward and update of a torch module, for one objective or several.

    Rows that the bool column ``mask`` of a batch says False of (``ColumnDataset(uneven="pad")`` adds it) count neither
    in losses nor in predictions.

    Args:
        model: Batch → outputs ``[B]``; by objective where there are several.
        loss: (outputs, labels) → scalar; or objectives by name.
        optimizers: Dense and sparse ones; by the names under which they are saved, or a sequence.
        label: The column of labels, ``[B]``, where ``loss`` is a function.
        groups: The column of groups for metrics by group, int64 ``[B]``, where ``loss`` is a function.
        precision: What towers compute in (autocast). With float16 losses are scaled, and updates left out where
            gradients, those of rows included, overflow; that waits for the device at each step.
        clip_grad_norm: Largest global norm of all gradients, those of tables included; None leaves them.
        schedules: Step after each update.
        weighting: Learns what the objectives weigh, whose own weights are then not looked at.
        compile: Modules, towers as a rule, to be compiled by ``torch.compile`` in place.
        loss_scale: The first scale of losses, for float16.

    Raises:
        ValueError: If precision is unknown, or the parameters of ``weighting`` are in no optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Mapping[str, Objective],
        optimizers: Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer],
        *,
        label: str = "label",
        groups: str | None = None,
        precision: Precision = "float32",
        clip_grad_norm: float | None = None,
        schedules: Sequence[Scheduler] = (),
        weighting: UncertaintyWeights | None = None,
        compile: Iterable[nn.Module] = (),
        loss_scale: float = 65536.0,
    ) -> None:
        if precision not in get_args(Precision):
            raise ValueError(f"TorchStep: precision must be one of {list(get_args(Precision))}, got {precision!r}")
        self.model = model
        self.objectives: dict[str, Objective] = (
            dict(loss) if isinstance(loss, Mapping) else {"": Objective(loss=loss, label=label, groups=groups)}
        )
        self.optimizers: dict[str, torch.optim.Optimizer] = (
            dict(optimizers)
            if isinstance(optimizers, Mapping)
            else {f"optimizer{number}": optimizer for number, optimizer in enumerate(optimizers)}
        )
        self.clip_grad_norm = clip_grad_norm
        self.schedules = list(schedules)
        self.weighting = weighting
        self.engines = [module for module in model.modules() if isinstance(module, EmbeddingEngine)]
        self.updates = 0
        """How many were done."""
        self.observer: Observer = NoObserver()
        self._dtype: torch.dtype = getattr(torch, precision)
        self._device = _device_of(model, self.engines)
        self._scaler = torch.amp.GradScaler(self._device, init_scale=loss_scale, enabled=precision == "float16")
        modules = [model] if weighting is None else [model, weighting]
        self._sync = GradientSync(modules, self.optimizers.values())
        self._synchronised = False
        self._expected: Sequence[Sequence[int]] | None = None
        if weighting is not None:
            _refuse_unlearnt(weighting, self.optimizers, self.objectives)
        for module in compile:
            module.compile()

    def synchronise(self) -> None:
        """Takes over rank 0's parameters and buffers, those that DistributedDataParallel or FSDP have excepted.

        All ranks call it together. From then on each update takes the mean gradient over the samples of all ranks.

        Raises:
            ValueError: The ranks' towers have parameters of other names, shapes or dtypes.
        """
        distributed.attend()
        if distributed.world_size() > 1:
            self._sync.broadcast()
        self._synchronised = True

    def expect(self, rows: Sequence[Sequence[int]]) -> None:
        """Is told the rows that each rank has in each batch of the next update."""
        self._expected = rows

    def _share(self, number: int, expected: Sequence[Sequence[int]] | None) -> float:
        """Returns this rank's share of the samples of a batch, as its tables count it."""
        shared = [engine for engine in self.engines if engine.group is not None]
        if shared:
            return shared[0].share
        if expected is None:
            return 1 / distributed.world_size()
        return expected[number][distributed.rank()] / max(sum(expected[number]), 1)

    def __call__(self, *batches: Batch) -> dict[str, Tensor]:
        """Does one update from the mean gradient over the rows of the batches, of those of all ranks.

        Returns:
            ``loss``; ``loss/NAME`` and, where it changes, ``weight/NAME`` by objective; ``grad_norm`` if it is clipped.

        Raises:
            KeyError: If a batch lacks a label column, or the model does not give an objective.
        """
        self.model.train()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()
        several, expected, self._expected = distributed.world_size() > 1, self._expected, None
        if several and not self._synchronised:
            self.synchronise()
        self._sync.clear()
        rows = [sum(each) for each in expected] if expected else [batch_size(batch) for batch in batches]
        watched: dict[str, Tensor] = {}
        for number, (batch, own) in enumerate(zip(batches, rows, strict=True)):
            share = own / max(sum(rows), 1)
            with self.observer.phase("towers"):
                loss, seen = self._forward(batch)
                self.observer.backward("before")
                self._scaler.scale(loss if len(batches) == 1 else loss * share).backward()
                self.observer.backward("after")
                if several:
                    self._sync.add(self._share(number, expected))
            for name, value in seen.items():
                part = value if len(batches) == 1 else value * share
                watched[name] = watched[name] + part if name in watched else part
        with self.observer.phase("update"):
            watched |= self._update()
        return watched

    def prefetch(self, batch: Batch) -> None:
        """Begins to send the ids of a batch that comes later to the ranks that own them, where several share tables."""
        for engine in self.engines:
            engine.train()  # as it will be when the batch's turn comes
            engine.prefetch(batch)

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = self._outputs(batch)
        losses = {}
        for name, objective in self.objectives.items():
            kept, labels = _kept(batch, outputs[name], column_of(batch, objective.label))
            losses[name] = objective.loss(kept, labels) if len(labels) else kept.sum()
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

    def _outputs(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(self._device, self._dtype, enabled=self._dtype is not torch.float32):
            outputs = self.model(batch)
        by_name = outputs if isinstance(outputs, Mapping) else {"": outputs}
        missing = [name for name in self.objectives if name not in by_name]
        if missing:
            raise KeyError(f"TorchStep: the model gives {sorted(by_name)}, and there are objectives {missing} beside")
        return {name: by_name[name].float() for name in self.objectives}

    def _update(self) -> dict[str, Tensor]:
        norm = {}
        if distributed.world_size() > 1:
            with self.observer.phase("exchange"):
                self._sync.finish()
        if self.clip_grad_norm is not None:
            if self._scaler.is_enabled():
                for optimizer in self.optimizers.values():
                    self._scaler.unscale_(optimizer)
            norm["grad_norm"] = nn.utils.clip_grad_norm_(self._parameters(), self.clip_grad_norm)
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

    def _parameters(self) -> list[nn.Parameter]:
        learnt = [] if self.weighting is None else list(self.weighting.parameters())
        return [*self.model.parameters(), *learnt]

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Scored]:
        """Returns scores, labels and groups by objective.

        The model stays in evaluation mode, and tables insert nothing.

        Raises:
            KeyError: If the batch lacks a column of labels or groups.
        """
        self.model.eval()
        outputs = self._outputs(batch)
        result = {}
        for name, objective in self.objectives.items():
            kept, labels = _kept(batch, outputs[name], column_of(batch, objective.label))
            groups = None
            if objective.groups is not None:
                groups, _ = _kept(batch, column_of(batch, objective.groups, "group"), kept)
            result[name] = Scored(objective.link(kept), labels, groups)
        return result

    def parts(self) -> dict[str, object]:
        """Returns engines, model, optimizers, schedules and scale, by name."""
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        named = [name for name, module in model.named_modules() if isinstance(module, EmbeddingEngine)]
        engines = {"engine" if len(named) == 1 else f"engine.{name}": model.get_submodule(name) for name in named}
        parts: dict[str, object] = {"updates": self, **engines}
        if model not in self.engines:
            parts["model"] = model
        parts |= self.optimizers
        parts |= {f"schedule{number}": schedule for number, schedule in enumerate(self.schedules)}
        if self.weighting is not None:
            parts["weighting"] = self.weighting
        if self._scaler.is_enabled():
            parts["scaler"] = self._scaler
        return parts

    def state_dict(self) -> dict[str, Any]:
        """Returns how many updates were done."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.updates = state_dict["updates"]


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    # All of them are read, in one order: on several ranks, reading that of a table is for all ranks together.
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return any(gradient is not None for gradient in gradients)


def _kept(batch: Batch, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves out the rows that only fill a batch up."""
    mask = batch.get("mask")
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        return outputs, labels
    return outputs[mask], labels[mask] if len(labels) == len(mask) else labels


def _device_of(model: nn.Module, engines: Sequence[EmbeddingEngine]) -> str:
    tensors = [engine.device.type for engine in engines] + [parameter.device.type for parameter in model.parameters()]
    return tensors[0] if tensors else "cpu"


def _refuse_unlearnt(
    weighting: UncertaintyWeights,
    optimizers: Mapping[str, torch.optim.Optimizer],
    objectives: Mapping[str, Objective],
) -> None:
    learnt = {id(p) for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]}
    if any(id(parameter) not in learnt for parameter in weighting.parameters()):
        raise ValueError(
            "TorchStep: the parameters of weighting are in no optimizer; add weighting.parameters() to a dense one"
        )
    if set(weighting.names) != set(objectives):
        raise ValueError(f"TorchStep: weighting is of {weighting.names}, and the objectives are {list(objectives)}")
