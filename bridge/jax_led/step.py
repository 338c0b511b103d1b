"""JaxStep: a jitted training step with an optax transformation, for ``pipelines.Trainer``.

Legend: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from recis_hybrid.bridge.jax_led.objectives import metrics_of, objectives_of
from recis_hybrid.bridge.jax_led.tables import JaxTables
from recis_hybrid.bridge.optimizer import GradientTransformation
from recis_hybrid.bridge.state import JaxState
from recis_hybrid.validation import check_flag, check_type, describe_value


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
            features in ``tables.rows``, (params, vectors, inputs). With several objectives, a dict of outputs by
            objective.
        params: The parameters of the tower, a pytree of arrays.
        loss: (outputs, labels) → a loss for each row, ``[B]``, of which the mean is taken, or a scalar. Labels of as
            many elements as the outputs have their shape and dtype. Or a ``pipelines.Objective``
            with such a function, columns, a constant weight, and optionally a link of JAX; or several by name, of which
            the weighted sum is taken.
        optimizer: An optax transformation for ``params``.
        tables: The tables, with their optimizer.
        label: Column of labels, if ``loss`` is a function; None: ``loss`` takes only the outputs, and evaluation is
            impossible.
        groups: Column of groups for metrics by group, int64 ``[B]``, if ``loss`` is a function.
        inputs: Dense columns that the tower receives as arrays in ``inputs``, by name. For features in ``tables.rows``,
            ``inputs`` also has the row of each id, under the feature's name.
        link: Outputs → scores ``[B]`` for metrics and predictions; the default suits losses of logits. For regression
            use ``lambda outputs: outputs``.
        metrics: Training metrics: by name, for every objective; or by objective and name. They are updated with each
            training batch, and Trainer computes and resets them for each record of the log.
        check_gradients: Check all gradients before each update, and raise an error that names tables, features and ids,
            or parameters, if some are not finite. Waits for the device in each step.

    Attributes:
        state: A :class:`JaxState` of ``(params, state of the optimizer)``.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an objective has no loss or a variable weight, or metrics belong to no objective.

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
        loss: Any,
        optimizer: GradientTransformation,
        tables: JaxTables,
        *,
        label: str | None = "label",
        groups: str | None = None,
        inputs: Sequence[str] = (),
        link: Callable[[Any], Any] = jax.nn.sigmoid,
        metrics: Mapping[str, Any] | None = None,
        check_gradients: bool = False,
    ) -> None:
        check_flag("JaxStep", "check_gradients", check_gradients)
        for name, function in (("tower", tower), ("link", link)):
            if isinstance(function, type) or not callable(function):
                raise TypeError(f"JaxStep: {name} must be a function, got {describe_value(function)}")
        if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
            raise TypeError(
                f"JaxStep: optimizer must be an optax transformation, such as optax.adam(1e-3), got "
                f"{describe_value(optimizer)}; the optimizer of the tables belongs to JaxTables"
            )
        check_type("JaxStep", "tables", tables, JaxTables, "JaxTables(engine, optimizer)")
        self.tables = tables
        self.inputs = tuple(inputs)
        self.objectives = objectives_of(loss, label, groups, link)
        """Objectives by name; ``""`` for a single loss."""
        self.metrics = metrics_of(metrics, list(self.objectives))
        """Training metrics, by objective and name."""
        self.state = JaxState((params, jax.jit(optimizer.init)(params)))
        self.observer: Any = None
        """Times phases, if Trainer sets it."""
        self._tower, self._optimizer, self._checks = tower, optimizer, check_gradients
        self._all_reduce: GradientAllReduce | None = None
        self._expected_rows: Sequence[Sequence[int]] | None = None
        self._train = jax.jit(self._train_alone)
        self._add = jax.jit(lambda total, part: jax.tree.map(jnp.add, total, part))
        self._differentiate, self._apply = jax.jit(self._gradients), jax.jit(self._update)
        self._score = jax.jit(lambda *arguments: self._scores_of(self._outputs(*arguments), self.objectives))

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
            # New functions, because JAX keeps programs by function, and calls before had no buckets.
            self._differentiate = jax.jit(lambda *arguments: self._gradients(*arguments))
            self._apply = jax.jit(lambda *arguments: self._update(*arguments))

    def expect(self, rows: Sequence[Sequence[int]]) -> None:
        """Receive the number of rows on each rank for each batch of the next update."""
        self._expected_rows = rows

    def prefetch(self, batch: Mapping[str, Any]) -> None:
        """Start sending the ids of a later batch to the ranks that own them."""
        self.tables.prefetch(batch)

    def __call__(self, *batches: Mapping[str, Any]) -> dict[str, Any]:
        """Do one update with the mean gradient over the rows of the batches of all ranks.

        Args:
            *batches: One batch or several, whose gradients are accumulated.

        Returns:
            ``loss``, a scalar tensor; with several objectives, ``loss/NAME`` of each; and the training metrics.

        Raises:
            FloatingPointError: with ``check_gradients``, if a gradient is not finite; nothing is updated.
            KeyError: if a batch lacks a column, or the tower returns no outputs for an objective.
            TypeError: if a column is not dense, or there are several batches and the tables have no optimizer.
            ValueError: if there is no batch, or a loss is neither a scalar nor ``[B]``.
        """
        if not batches:
            raise ValueError("JaxStep: an update needs at least one batch, got none")
        if dist.is_initialized() and dist.get_world_size() > 1 and self._all_reduce is None:
            self.synchronize()
        expected, self._expected_rows = self._expected_rows, None
        if len(batches) > 1:
            try:
                return self._accumulated(batches, expected)
            except BaseException:
                if self.tables.optimizer is not None:
                    self.tables.optimizer.zero_grad()  # of the batches before the one that failed
                raise
        (batch,) = batches
        ctx, arguments, mask = self._looked_up(batch)
        with self._phase("towers"):
            params, opt_state = self.state.tree
            if self._all_reduce is None:
                state, losses, gradients, scores, finite = self._train(params, opt_state, *arguments)
            else:
                weight = np.float32(self.tables.engine.share)
                buckets, losses, gradients, scores, finite = self._differentiate(params, *arguments, 1.0, weight)
            # Waits for the call on the CPU, so that the batch may be overwritten.
            figures = {name: to_torch(loss) for name, loss in losses.items()}
            if self._checks:
                self._refuse_non_finite(finite, figures["loss"], params, arguments, ctx, gradients)
            if self._all_reduce is None:
                self.state.tree = state
        if self._all_reduce is not None:
            with self._phase("exchange"):
                buckets = self._all_reduce.sum(buckets)
        with self._phase("update"):
            if self._all_reduce is not None:
                self.state.tree = self._apply(params, opt_state, buckets)
            self.tables.apply_gradients(ctx, gradients)
        return {**figures, **self._updated_metrics(batch, scores, mask)}

    def _accumulated(
        self, batches: Sequence[Mapping[str, Any]], expected: Sequence[Sequence[int]] | None
    ) -> dict[str, Any]:
        """Do one update from several batches, each weighted by its share of the rows."""
        own = [self._rows(batch) for batch in batches]
        rows = [sum(each) for each in expected] if expected else own
        params, opt_state = self.state.tree
        total: Any = None
        figures: dict[str, torch.Tensor] = {}
        metrics: dict[str, Any] = {}
        for batch, count, mine in zip(batches, rows, own, strict=True):
            ctx, arguments, mask = self._looked_up(batch)
            with self._phase("towers"):
                share = count / max(sum(rows), 1)
                weight = np.float32(1 if self._all_reduce is None else self.tables.engine.share)
                part, losses, gradients, scores, finite = self._differentiate(params, *arguments, share, weight)
                if self._checks:
                    self._refuse_non_finite(finite, to_torch(losses["loss"]), params, arguments, ctx, gradients)
                total = part if total is None else self._add(total, part)
                for name, loss in losses.items():
                    value = to_torch(loss) * (mine / max(sum(own), 1))
                    figures[name] = figures[name] + value if name in figures else value
            self.tables.add_gradients(ctx, gradients)
            metrics = self._updated_metrics(batch, scores, mask)
        if self._all_reduce is not None:
            with self._phase("exchange"):
                total = self._all_reduce.sum(total)
        with self._phase("update"):
            self.state.tree = self._apply(params, opt_state, total)
            self.tables.optimizer.step()
        return {**figures, **metrics}

    def _looked_up(self, batch: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...], torch.Tensor | None]:
        """Return the context of a batch's lookup; the arguments of the objective after the parameters; and the mask."""
        with self._phase("lookup"):
            vectors, ctx = self.tables.lookup(batch)
        with self._phase("towers"):
            inputs, labels, mask = self._inputs(batch, ctx.index), self._labels(batch), row_mask(batch)
        return ctx, (vectors, inputs, labels, None if mask is None else as_array("mask", mask)), mask

    def _rows(self, batch: Mapping[str, Any]) -> int:
        """Return the number of rows of a batch."""
        column = next((batch[name] for name in self.tables.engine.configs if name in batch), ())
        return int(column.batch_size) if hasattr(column, "batch_size") else len(column)

    def score(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Return the scores of a batch by objective, ``[B]`` without padding rows; it needs no labels.

        Tables insert nothing.
        """
        mask = row_mask(batch)
        return {name: _without_padding(to_torch(scores), mask) for name, scores in self._scored(batch).items()}

    def predict(self, batch: Mapping[str, Any]) -> dict[str, Predictions]:
        """Return the scores, labels and groups of a batch by objective, without padding rows.

        Tables insert nothing.

        Raises:
            KeyError: if the batch lacks a column of labels or groups.
        """
        mask = row_mask(batch)
        return {name: self._predictions(name, batch, scores, mask) for name, scores in self._scored(batch).items()}

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

    def _labels(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the labels by objective; None for objectives without labels."""
        columns = dict.fromkeys(each.label for each in self.objectives.values() if each.label is not None)
        arrays = {name: as_array(f"label {name!r}", dense_column(batch, name, "label")) for name in columns}
        return {name: None if each.label is None else arrays[each.label] for name, each in self.objectives.items()}

    def _predictions(self, name: str, batch: Mapping[str, Any], scores: Any, mask: torch.Tensor | None) -> Predictions:
        objective = self.objectives[name]
        labels = None if objective.label is None else dense_column(batch, objective.label, "label")
        groups = None if objective.groups is None else dense_column(batch, objective.groups, "group")
        return Predictions(*(_without_padding(each, mask) for each in (to_torch(scores), labels, groups)))

    def _updated_metrics(
        self, batch: Mapping[str, Any], scores: Mapping[str, Any], mask: torch.Tensor | None
    ) -> dict[str, Any]:
        """Update the training metrics, unless the batch has no rows, and return them by their names in the log."""
        named = {}
        for objective, metrics in self.metrics.items():
            if scores[objective].size:
                predictions = self._predictions(objective, batch, scores[objective], mask)
                for metric in metrics.values():
                    _update(metric, predictions)
            named.update({f"{objective}.{name}".removeprefix("."): metric for name, metric in metrics.items()})
        return named

    def _refuse_non_finite(
        self, finite: jax.Array, loss: torch.Tensor, params: Any, arguments: Any, ctx: Any, gradients: Any
    ) -> None:
        """Raise FloatingPointError if gradients are not finite on a rank; collective if there are several."""
        faulty = torch.tensor([float(not finite)])
        if self._all_reduce is not None:
            dist.all_reduce(faulty, op=dist.ReduceOp.MAX)
        if not faulty:
            return
        where = f"JaxStep: gradients are not finite, with a loss of {float(loss)}, and nothing was updated"
        if finite:
            raise FloatingPointError(f"{where}: those of another rank; see its error")
        found = self.tables.describe_non_finite(ctx, gradients)
        of_params, _ = jax.jit(jax.grad(self._objective, has_aux=True))(params, *arguments)
        leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(of_params)]
        found += [f"parameter {name} of the tower" for name, leaf in leaves if not bool(jnp.isfinite(leaf).all())]
        rows = self.tables.describe_non_finite(ctx, arguments[0])
        hint = f". Rows were not finite before the step: {rows[0]}" if rows else ""
        raise FloatingPointError(f"{where}: {', '.join(found)}{hint}")

    def _phase(self, name: str) -> AbstractContextManager[None]:
        phase: AbstractContextManager[None] = nullcontext() if self.observer is None else self.observer.phase(name)
        return phase

    # The functions below run inside jit.

    def _are_finite(self, gradients: Any) -> jax.Array | None:
        """Return whether all gradients are finite, bool ``[]``; None if they are not checked."""
        return (
            jnp.stack([jnp.isfinite(each).all() for each in jax.tree.leaves(gradients)]).all() if self._checks else None
        )

    def _outputs(self, params: Any, vectors: Any, inputs: Any) -> Any:
        return self._tower(params, vectors, inputs) if inputs else self._tower(params, vectors)

    def _by_objective(self, outputs: Any) -> Mapping[str, Any]:
        if list(self.objectives) == [""]:
            return {"": outputs}
        if not isinstance(outputs, Mapping) or not self.objectives.keys() <= outputs.keys():
            got = sorted(outputs) if isinstance(outputs, Mapping) else describe_value(outputs)
            raise KeyError(
                f"JaxStep: with the objectives {list(self.objectives)} the tower must return a dict with outputs for "
                f"each, got {got}"
            )
        return outputs

    def _scores_of(self, outputs: Any, objectives: Iterable[str]) -> dict[str, Any]:
        by_objective = self._by_objective(outputs)
        return {name: self.objectives[name].scores(by_objective[name]) for name in objectives}

    def _objective(
        self, params: Any, vectors: Any, inputs: Any, labels: Mapping[str, Any], mask: Any
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict[str, Any]]]:
        """Return the loss of a batch; and its figures, and the scores for metrics, by objective."""
        outputs = self._outputs(params, vectors, inputs)
        of = self._by_objective(outputs)
        losses = {name: each.mean_loss(of[name], labels[name], mask) for name, each in self.objectives.items()}
        weighted = [
            losses[name] if each.weight == 1 else each.weight * losses[name] for name, each in self.objectives.items()
        ]
        figures = {"loss": sum(weighted[1:], weighted[0])}
        if list(losses) != [""]:
            figures |= {f"loss/{name}": loss for name, loss in losses.items()}
        return figures["loss"], (figures, self._scores_of(outputs, self.metrics))

    def _update(self, params: Any, opt_state: Any, gradients: Any) -> tuple[Any, Any]:
        """Apply gradients, or the summed buckets of all ranks."""
        if self._all_reduce is not None:
            gradients = self._all_reduce.unpack(gradients)
        changes, opt_state = self._optimizer.update(gradients, opt_state, params)
        return jax.tree.map(lambda p, change: (p + change).astype(p.dtype), params, changes), opt_state

    def _train_alone(self, params: Any, opt_state: Any, *arguments: Any) -> tuple[Any, ...]:
        """Return the new state, losses, gradients of the vectors, scores for metrics, and whether all are finite."""
        differentiated = jax.grad(self._objective, argnums=(0, 1), has_aux=True)
        (ours, of_vectors), (losses, scores) = differentiated(params, *arguments)
        finite = self._are_finite((ours, of_vectors))
        return self._update(params, opt_state, ours), losses, of_vectors, scores, finite

    def _gradients(
        self, params: Any, vectors: Any, inputs: Any, labels: Any, mask: Any, share: Any, weight: Any
    ) -> tuple[Any, ...]:
        """Like :meth:`_train_alone`, with a batch's share of the gradients in place of the new state.

        On several ranks, the gradients of the parameters are in buckets, and multiplied by the rank's weight.
        """
        differentiated = jax.grad(self._objective, argnums=(0, 1), has_aux=True)
        gradients, (losses, scores) = differentiated(params, vectors, inputs, labels, mask)
        # A batch without rows may have a gradient of NaN.
        shared = jax.tree.map(lambda each: jnp.where(share == 0, 0, each * share).astype(each.dtype), gradients)
        ours, of_vectors = shared
        finite = self._are_finite(shared)
        ours = ours if self._all_reduce is None else self._all_reduce.pack(ours, weight)
        return ours, losses, of_vectors, scores, finite


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
