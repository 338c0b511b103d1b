"""EMA: exponential moving averages of dense parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recis_hybrid.embedding import Anchor
from recis_hybrid.pipelines.callback import Callback
from recis_hybrid.pipelines.stages import Run
from recis_hybrid.ragged import Batch
from recis_hybrid.saver.parts.module_names import without_wrappers
from recis_hybrid.validation import check_number, check_type


class EMA(Callback):
    r"""Averages a model's dense parameters over the training steps, with exponentially decaying weights.

    After the n-th step, with n from 0,

    $$\bar\theta \leftarrow d \bar\theta + (1 - d) \theta, \quad d = \min(\text{decay}, (1 + n) / (10 + n)).$$

    The lower decay of the first steps lets the averages leave the initial parameters behind. Embedding tables and
    frozen parameters have no averages; a parameter that is unfrozen later gets one then. Averages of bfloat16 and
    float16 parameters are float32, because smaller changes would be lost. Buffers are not averaged. The averages are
    part of the trainer's checkpoints, and on several ranks they are equal, like the parameters.

    Args:
        module: The model, or one of its towers, in torch or JAX. It may be wrapped or compiled.
        decay: Weight of the previous averages, from 0 to less than 1.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The decay is out of range.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> ema = EMA(model, decay=0.999)  # for Trainer(callbacks=[ema]) and Evaluate(within=ema.averaged)
        >>> with ema.averaged():
        ...     prediction = model(torch.ones(1, 2))

    References:
        B. Polyak and A. Juditsky: Acceleration of stochastic approximation by averaging. SIAM J. Control Optim. 30(4),
        1992. The decay of the first steps is that of ``tf.train.ExponentialMovingAverage``.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        check_type("EMA", "module", module, nn.Module, "a torch.nn.Module")
        check_number("EMA", "decay", decay)
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be from 0 to less than 1, got {decay}")
        self._module, self._decay = module, float(decay)
        self.updates = 0
        """Number of steps in the averages."""
        self.averages: dict[str, Tensor] = {}
        """The averages by the names of the parameters, without wrappers."""
        self._running: tuple[Run, int] | None = None

    def before_step(self, trainer: Run, batches: Sequence[Batch]) -> None:
        """Start the averages of parameters that have not been trained before."""
        for name, parameter in self._parameters().items():
            if parameter.requires_grad and name not in self.averages:
                value = parameter.detach()
                self.averages[name] = value.to(_dtype_of_average(value), copy=True)
        self._running = trainer, trainer.steps_done

    def after_step(self, trainer: Run) -> None:
        """Update the averages."""
        self._finish_step()

    def _finish_step(self) -> None:
        """Update the averages if a step has ended since the last update.

        A callback before this one may save or evaluate in its own ``after_step``.
        """
        if self._running is None or self._running[0].steps_done == self._running[1]:
            return
        self._running = None
        weight = 1 - min(self._decay, (1 + self.updates) / (10 + self.updates))
        parameters = self._parameters()
        values = [parameters[name].detach().to(average.dtype) for name, average in self.averages.items()]
        if values:
            torch._foreach_lerp_(list(self.averages.values()), values, weight)
        self.updates += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Replace the parameters with their averages in the context, as for predictions and exports."""
        self._finish_step()
        parameters = self._parameters()
        trained = {name: parameters[name].data for name in self.averages}
        try:
            for name, average in self.averages.items():
                parameters[name].data = average.to(trained[name].dtype)
            yield
        finally:
            for name, value in trained.items():
                parameters[name].data = value

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the number of steps."""
        self._finish_step()
        return {"updates": self.updates, "averages": dict(self.averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            ValueError: The model has no parameter of a name, or one of another shape.
        """
        parameters, averages = self._parameters(), dict(state["averages"])
        for name, average in averages.items():
            live = list(parameters[name].shape) if name in parameters else None
            if live != list(average.shape):
                found = "no such parameter" if live is None else f"one of shape {live}"
                raise ValueError(
                    f"EMA: the checkpoint has an average of {name!r} with shape {list(average.shape)}, but the module "
                    f"has {found}; build EMA with the module that was trained"
                )
            averages[name] = average.to(parameters[name].device)
        self.updates, self.averages, self._running = state["updates"], averages, None

    def _parameters(self) -> dict[str, nn.Parameter]:
        named = dict(self._module.named_parameters())
        plain = zip(without_wrappers(self._module, list(named)), named.values(), strict=True)
        return {name: parameter for name, parameter in plain if not isinstance(parameter, Anchor)}


def _dtype_of_average(value: Tensor) -> torch.dtype:
    return torch.float32 if value.dtype in (torch.bfloat16, torch.float16) else value.dtype
