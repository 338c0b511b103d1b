"""JaxStep: a jitted training step with an optax transformation, for ``pipelines.Trainer``.

Legend: B rows of a batch, D dim, K outputs per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.distributed as dist

from recis_hybrid.bridge.all_reduce import GradientAllReduce
from recis_hybrid.bridge.exchange.dlpack import to_torch
from recis_hybrid.bridge.jax_led.columns import as_array, dense_column, row_mask
from recis_hybrid.bridge.jax_led.tables import JaxTables
from recis_hybrid.bridge.optimizer import GradientTransformation
from recis_hybrid.bridge.state import JaxState
from recis_hybrid.validation import check_type, describe_value


@dataclass(frozen=True, eq=False)
class Predictions:
    """Scores of a batch, and the labels and groups for metrics, as ``pipelines.Predictions``."""

    scores: torch.Tensor
    """Floating ``[B]``."""
    labels: torch.Tensor | None
    """``[B]``; None if the step has no labels."""
    groups: torch.Tensor | None
    """int64 ``[B]``; None if the step has no groups."""


class JaxStep:
    """A training step led by JAX: tower, loss, gradients and the optax update in one jitted call, and then the tables.

    It is a step for ``pipelines.Trainer``, with evaluation, prediction, checkpoints and metrics as with TorchStep. On
    several ranks the parameters start with those of rank 0, and their gradients are averaged over the samples of all
    ranks between two jitted calls. A new batch size triggers a compilation, so drop the remainder of training data.
    Padding rows, where the bool column ``mask`` is False, count neither in losses nor in predictions.

    Args:
        tower: (params, vectors) → outputs ``[B]``, where ``vectors`` is a dict by feature; or, with ``inputs`` or
            features in ``tables.rows``, (params, vectors, inputs).
        params: The parameters of the tower, a pytree of arrays.
        loss: (outputs, labels) → a loss for each row, ``[B]``, of which the mean is taken, or a scalar. Labels of as
            many elements as the outputs have their shape and dtype.
        optimizer: An optax transformation for ``params``.
        tables: The tables, with their optimizer.
        label: Column of labels; None: ``loss`` takes only the outputs, and evaluation is impossible.
        groups: Column of groups for metrics by group, int64 ``[B]``.
        inputs: Dense columns that the tower receives as arrays in ``inputs``, by name. For features in ``tables.rows``,
            ``inputs`` also has the row of each id, under the feature's name.
        link: Outputs → scores ``[B]`` for metrics and predictions; the default suits losses of logits. For regression
            use ``lambda outputs: outputs``.
        metrics: Training metrics by name. They are updated with each training batch, and Trainer computes and resets
            them for each record of the log.

    Attributes:
        state: A :class:`JaxState` of ``(params, state of the optimizer)``.

    Raises:
        TypeError: if an argument has the wrong type.

    Example:
        ::

            tables = JaxTables(engine, engine.make_optimizer(lr=1e-3))
            step = JaxStep(mlp, params, optax.sigmoid_binary_cross_entropy, optax.adam(1e-3), tables)
            Trainer(step, train_data, eval_data, metrics={"auc": AUC()}).fit([Train(epochs=1), Evaluate()])
    """

    def __init__(
        self,
        tower: Callable[..., Any],
        params: Any,
        loss: Callable[..., Any],
        optimizer: GradientTransformation,
        tables: JaxTables,
        *,
        label: str | None = "label",
        groups: str | None = None,
        inputs: Sequence[str] = (),
        link: Callable[[Any], Any] = jax.nn.sigmoid,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        for name, function in (("tower", tower), ("loss", loss), ("link", link)):
            if isinstance(function, type) or not callable(function):
                raise TypeError(f"JaxStep: {name} must be a function, got {describe_value(function)}")
        if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
            raise TypeError(
                f"JaxStep: optimizer must be an optax transformation, such as optax.adam(1e-3), got "
                f"{describe_value(optimizer)}; the optimizer of the tables belongs to JaxTables"
            )
        check_type("JaxStep", "tables", tables, JaxTables, "JaxTables(engine, optimizer)")
        self.tables = tables
        self.label, self.groups, self.inputs = label, groups, tuple(inputs)
        self.metrics = dict(metrics or {})
        """Training metrics by name."""
        self.state = JaxState((params, jax.jit(optimizer.init)(params)))
        self.observer: Any = None
        """Times phases, if Trainer sets it."""
        self._tower, self._loss, self._optimizer, self._link = tower, loss, optimizer, link
        self._all_reduce: GradientAllReduce | None = None
        self._train = jax.jit(self._train_alone)
        self._differentiate, self._apply = jax.jit(self._gradients), jax.jit(self._update)
        self._score = jax.jit(lambda *arguments: self._scores_of(self._outputs(*arguments)))

    def __repr__(self) -> str:
        leaves = len(jax.tree.leaves(self.state.tree[0]))
        return f"JaxStep({getattr(self._tower, '__name__', 'tower')}, parameters={leaves})"

    @property
    def engines(self) -> list[Any]:
        """The engine of the tables."""
        return [self.tables.engine]

    def synchronize(self) -> None:
        """Take rank 0's parameters, and average gradients over the ranks from now on; collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            params, opt_state = self.state.tree
            self._all_reduce = GradientAllReduce(params)
            self.state.tree = self._all_reduce.broadcast(params), opt_state

    def expect(self, rows: Sequence[Sequence[int]]) -> None:
        """Do nothing, because the engine counts the samples of all ranks itself."""

    def prefetch(self, batch: Mapping[str, Any]) -> None:
        """Start sending the ids of a later batch to the ranks that own them."""
        self.tables.prefetch(batch)

    def __call__(self, *batches: Mapping[str, Any]) -> dict[str, Any]:
        """Do one update from one batch.

        Args:
            *batches: One batch.

        Returns:
            ``loss``, a scalar tensor, and the training metrics.

        Raises:
            KeyError: if the batch lacks a column.
            TypeError: if a column is not dense.
            ValueError: if there are several batches, or the loss is neither a scalar nor ``[B]``.
        """
        if len(batches) != 1:
            raise ValueError(
                f"JaxStep: an update must have one batch, got {len(batches)}; set Trainer(accumulate=1) and a larger "
                f"batch size"
            )
        (batch,) = batches
        if dist.is_initialized() and dist.get_world_size() > 1 and self._all_reduce is None:
            self.synchronize()
        with self._phase("lookup"):
            vectors, ctx = self.tables.lookup(batch)
        with self._phase("towers"):
            inputs, labels, mask = self._inputs(batch, ctx.index), self._labels(batch), row_mask(batch)
            arguments = vectors, inputs, labels, None if mask is None else as_array("mask", mask)
            params, opt_state = self.state.tree
            if self._all_reduce is None:
                self.state.tree, loss, gradients, scores = self._train(params, opt_state, *arguments)
            else:
                weight = np.float32(self.tables.engine.share)
                buckets, loss, gradients, scores = self._differentiate(params, *arguments, weight)
            figures = {"loss": to_torch(loss)}  # waits for the call on the CPU, so that the batch may be overwritten
        if self._all_reduce is not None:
            with self._phase("exchange"):
                buckets = self._all_reduce.sum(buckets)
        with self._phase("update"):
            if self._all_reduce is not None:
                self.state.tree = self._apply(params, opt_state, buckets)
            self.tables.apply_gradients(ctx, gradients)
        if self.metrics and scores.size:
            predictions = self._predictions(batch, scores, mask)
            for metric in self.metrics.values():
                _update(metric, predictions)
        return {**figures, **self.metrics}

    def score(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the scores of a batch, ``[B]`` without padding rows, under the name ``""``; it needs no labels.

        Tables insert nothing.
        """
        return {"": _without_padding(to_torch(self._scored(batch)), row_mask(batch))}

    def predict(self, batch: Mapping[str, Any]) -> dict[str, Predictions]:
        """Return the scores, labels and groups of a batch, without padding rows, under the name ``""``.

        Tables insert nothing.

        Raises:
            KeyError: if the batch lacks a column of labels or groups.
        """
        return {"": self._predictions(batch, self._scored(batch), row_mask(batch))}

    def parts(self) -> dict[str, object]:
        """Return engine, sparse optimizer and state by name, for ``Saver.save``."""
        sparse = {} if self.tables.optimizer is None else {"sparse": self.tables.optimizer}
        return {"engine": self.tables.engine, **sparse, "jax": self.state}

    def _scored(self, batch: Mapping[str, Any]) -> Any:
        vectors, ctx = self.tables.lookup(batch, train=False)
        return self._score(self.state.tree[0], vectors, self._inputs(batch, ctx.index))

    def _inputs(self, batch: Mapping[str, Any], index: Mapping[str, Any]) -> dict[str, Any]:
        """Return the third argument of the tower; an empty dict if it takes none."""
        return {name: as_array(f"input {name!r}", dense_column(batch, name)) for name in self.inputs} | dict(index)

    def _labels(self, batch: Mapping[str, Any]) -> Any:
        if self.label is None:
            return None
        return as_array(f"label {self.label!r}", dense_column(batch, self.label, "label"))

    def _predictions(self, batch: Mapping[str, Any], scores: Any, mask: torch.Tensor | None) -> Predictions:
        labels = None if self.label is None else dense_column(batch, self.label, "label")
        groups = None if self.groups is None else dense_column(batch, self.groups, "group")
        return Predictions(*(_without_padding(each, mask) for each in (to_torch(scores), labels, groups)))

    def _phase(self, name: str) -> AbstractContextManager[None]:
        phase: AbstractContextManager[None] = nullcontext() if self.observer is None else self.observer.phase(name)
        return phase

    # The functions below run inside jit.

    def _outputs(self, params: Any, vectors: Any, inputs: Any) -> Any:
        return self._tower(params, vectors, inputs) if inputs else self._tower(params, vectors)

    def _scores_of(self, outputs: Any) -> Any:
        scores = self._link(outputs)
        return scores[:, 0] if scores.ndim == 2 and scores.shape[1] == 1 else scores

    def _objective(
        self, params: Any, vectors: Any, inputs: Any, labels: Any, mask: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return the mean loss of a batch; and its scores, if there are metrics."""
        outputs = self._outputs(params, vectors, inputs)
        if labels is not None and labels.size == outputs.size:
            labels = labels.reshape(outputs.shape).astype(outputs.dtype)
        if mask is not None:  # a NaN in a padding row would reach all gradients, even where its loss is dropped
            outputs, labels = _zeroed(outputs, mask), labels if labels is None else _zeroed(labels, mask)
        losses = self._loss(outputs) if labels is None else self._loss(outputs, labels)
        rows = outputs.shape[0]
        if losses.ndim == 0:
            if mask is not None:
                raise ValueError(
                    "JaxStep: loss must return a loss for each row, [B], to omit padding rows, got a scalar; remove "
                    "the mean from it"
                )
            loss = losses if rows else jnp.zeros_like(losses)  # a mean over no rows is NaN
        elif losses.shape == (rows,) or losses.shape == (rows, 1):
            losses = losses.reshape(rows)
            counted = rows if mask is None else mask.sum()
            loss = (losses if mask is None else jnp.where(mask, losses, 0)).sum() / jnp.maximum(counted, 1)
        else:
            raise ValueError(
                f"JaxStep: loss must return a scalar or a loss for each row, [{rows}], got {list(losses.shape)} for "
                f"outputs {list(outputs.shape)}"
            )
        return loss, self._scores_of(outputs) if self.metrics else None

    def _update(self, params: Any, opt_state: Any, gradients: Any) -> tuple[Any, Any]:
        """Apply gradients, or the summed buckets of all ranks."""
        if self._all_reduce is not None:
            gradients = self._all_reduce.unpack(gradients)
        changes, opt_state = self._optimizer.update(gradients, opt_state, params)
        return jax.tree.map(lambda p, change: (p + change).astype(p.dtype), params, changes), opt_state

    def _train_alone(self, params: Any, opt_state: Any, *arguments: Any) -> tuple[Any, Any, Any, Any]:
        """Return the new state, the loss, the gradients of the vectors, and scores for metrics."""
        differentiated = jax.value_and_grad(self._objective, argnums=(0, 1), has_aux=True)
        (loss, scores), (ours, of_vectors) = differentiated(params, *arguments)
        return self._update(params, opt_state, ours), loss, of_vectors, scores

    def _gradients(self, params: Any, vectors: Any, inputs: Any, labels: Any, mask: Any, weight: Any) -> Any:
        """Return the weighted gradients in buckets, the loss, the gradients of the vectors, and scores for metrics."""
        assert self._all_reduce is not None
        differentiated = jax.value_and_grad(self._objective, argnums=(0, 1), has_aux=True)
        (loss, scores), (ours, of_vectors) = differentiated(params, vectors, inputs, labels, mask)
        return self._all_reduce.pack(ours, weight), loss, of_vectors, scores


def _zeroed(values: Any, mask: Any) -> Any:
    """Return values with zeros in padding rows; for use inside jit."""
    return jnp.where(mask.reshape(-1, *[1] * (values.ndim - 1)), values, 0)


def _without_padding(column: torch.Tensor | None, mask: torch.Tensor | None) -> Any:
    return column if column is None or mask is None else column[mask.to(column.device)]


def _update(metric: Any, predictions: Predictions) -> None:
    if predictions.labels is None:
        raise ValueError("JaxStep: training metrics need labels; set JaxStep(label=) to their column")
    labels = predictions.labels.reshape(predictions.scores.shape)
    if getattr(metric, "takes_groups", False):
        if predictions.groups is None:
            raise ValueError("JaxStep: a training metric needs groups; set JaxStep(groups=) to their column")
        metric.update(predictions.scores, labels, predictions.groups)
    else:
        metric.update(predictions.scores, labels)
