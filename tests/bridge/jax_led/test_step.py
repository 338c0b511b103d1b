"""JaxStep: updates, metrics, predictions, padding rows, inputs, and two ranks beside one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from recis_hybrid.metrics import AUC, GAUC
from recis_hybrid.pipelines import Evaluate, Objective, Train, Trainer, evaluate
from recis_hybrid.pipelines.predict import predict
from recis_hybrid.ragged import Batch, RaggedTensor
from tests.support.near import OF_ADAM, assert_near
from tests.support.programs import on_two_ranks

pytestmark = [pytest.mark.jax, pytest.mark.usefixtures("compiled_once")]
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
jnp = jax.numpy
from recis_hybrid.bridge.jax_led import JaxStep, JaxTables  # noqa: E402

BCE = optax.sigmoid_binary_cross_entropy


def mlp(params: Any, vectors: Any) -> Any:
    return (jnp.tanh(vectors["item"] @ params["w"]) @ params["v"])[:, 0]


def params() -> Any:
    random = np.random.default_rng(0)
    return {"w": jnp.array(random.normal(0, 0.5, (4, 8)), "f"), "v": jnp.array(random.normal(0, 0.5, (8, 1)), "f")}


def tables_of(rows: Any = ()) -> JaxTables:
    config = EmbeddingConfig(dim=4, initializer=Normal(0, 0.5))
    engine = EmbeddingEngine({"item": config}, optimizer=optim.Adagrad, seed=1)
    return JaxTables(engine, engine.make_optimizer(lr=0.1), rows=rows)


def make(tower: Any = mlp, loss: Any = BCE, rows: Any = (), **more: Any) -> JaxStep:
    return JaxStep(tower, params(), loss, optax.adam(0.01), tables_of(rows), **more)


def some_batch(seed: int, count: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (count,), generator=generator)
    return {"item": ids, "label": (ids % 3 == 0).float(), "user": ids % 5}


def rows_of(step: JaxStep) -> torch.Tensor:
    embeddings: torch.Tensor = step.engines[0].tables[0].export(0)["embedding"]
    return embeddings


def test_an_update_is_that_of_a_hand_written_loop() -> None:
    step, tables = make(), tables_of()
    weights, tx = params(), optax.adam(0.01)
    state = tx.init(weights)
    for seed in range(4):
        batch = some_batch(seed)
        figures = step(batch)
        vectors, ctx = tables.lookup(batch)

        def loss_of(weights: Any, vectors: Any, batch: Batch = batch) -> Any:
            return BCE(mlp(weights, vectors), batch["label"].numpy()).mean()  # type: ignore[union-attr]

        loss, (ours, of_vectors) = jax.value_and_grad(loss_of, argnums=(0, 1))(weights, vectors)
        changes, state = tx.update(ours, state, weights)
        weights = optax.apply_updates(weights, changes)
        tables.apply_gradients(ctx, of_vectors)
        assert_near(figures["loss"], loss)
    assert_near(step.state.tree[0], weights, 8 * 64)
    assert_near(rows_of(step), tables.engine.tables[0].export(0)["embedding"], 8 * 64)  # type: ignore[attr-defined]


def test_metrics_predictions_and_scores() -> None:
    seen = AUC()
    step = make(groups="user", metrics={"auc": seen, "gauc": GAUC()})
    batches = [some_batch(seed) for seed in range(12)]
    trainer = Trainer(step, batches, batches, metrics={"auc": AUC(), "gauc": GAUC()}, log_every=4)
    figures = trainer.fit([Train(epochs=6), Evaluate()])["eval"]
    assert figures["auc"] > 0.95
    before = rows_of(step).clone()
    (found,) = step.predict(some_batch(99)).values()
    assert found.labels is not None
    assert found.groups is not None
    assert found.scores.shape == found.labels.shape == found.groups.shape == (32,)
    assert (found.scores > 0).all()
    assert (found.scores < 1).all()
    assert torch.equal(step.score({"item": some_batch(99)["item"]})[""], found.scores)
    (scored,) = predict(step, [some_batch(99)])
    assert torch.equal(scored["score"], found.scores)  # type: ignore[arg-type]
    step.predict({**some_batch(0), "item": torch.arange(1000, 1032)})
    assert torch.equal(rows_of(step), before)
    assert evaluate(step, batches, {"auc": AUC()})["auc"] == figures["auc"]


def test_padding_rows_count_nowhere() -> None:
    batch = some_batch(0, 24)
    padded = {name: torch.cat([column, column[:8]]) for name, column in batch.items()}  # type: ignore[list-item]
    padded["label"][24:] = torch.nan
    padded["mask"] = torch.arange(32) < 24
    steps = [make(metrics={"auc": AUC()}) for _ in range(2)]
    losses = [step(each)["loss"] for step, each in zip(steps, (batch, padded), strict=True)]
    assert_near(losses[1], losses[0])
    assert_near(steps[1].state.tree[0], steps[0].state.tree[0], 8 * 64)
    assert_near(rows_of(steps[1]), rows_of(steps[0]), 8 * 64)
    assert steps[0].metrics[""]["auc"].compute() == steps[1].metrics[""]["auc"].compute()
    (found,) = steps[1].predict(padded).values()
    assert found.scores.shape == found.labels.shape == (24,)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="loss must return a loss for each row"):
        make(loss=lambda outputs, labels: BCE(outputs, labels).mean())(padded)


def test_a_batch_without_rows_changes_nothing() -> None:
    step = make(metrics={"auc": AUC()})
    before = params()
    assert float(step(some_batch(0, 0))["loss"]) == 0
    assert_near(step.state.tree[0], before)
    assert len(rows_of(step)) == 0


@pytest.mark.parametrize("kind", ["torch", "numpy", "jax", "int64", "float64", "column", "misaligned"])
def test_labels_of_any_kind(kind: str) -> None:
    expected, step = make(), make()
    batch = some_batch(0)
    label = batch["label"]
    assert isinstance(label, torch.Tensor)
    storage = torch.cat([torch.zeros(1), label])
    converted: Any = {
        "torch": label,
        "numpy": label.numpy(),
        "jax": jnp.asarray(label.numpy()),
        "int64": label.long(),
        "float64": label.double(),
        "column": label[:, None],
        "misaligned": storage[1:],
    }[kind]
    assert torch.equal(step({**batch, "label": converted})["loss"], expected(batch)["loss"])


def test_rows_and_dense_inputs() -> None:
    def tower(params: Any, vectors: Any, inputs: Any) -> Any:
        pooled = vectors["item"][inputs["item"]].sum(1) * inputs["price"][:, None]
        return mlp(params, {"item": pooled})

    batch = {"item": RaggedTensor.from_lists([[1, 2, 1], [], [2]]), "price": torch.tensor([1.0, 2.0, 3.0])}
    batch["label"] = torch.tensor([1.0, 0.0, 1.0])
    by_rows = make(tower, rows=["item"], inputs=["price"])
    pooled = make(lambda params, v, i: mlp(params, {"item": v["item"] * i["price"][:, None]}), inputs=["price"])
    for _ in range(3):
        losses = [step(batch)["loss"] for step in (by_rows, pooled)]
        assert_near(losses[0], losses[1])
    assert_near(rows_of(by_rows), rows_of(pooled), 8 * 64)
    (scores,) = by_rows.score(batch).values()
    assert_near(scores, pooled.score(batch)[""], 8 * 64)


def test_gradients_that_are_not_finite_are_refused() -> None:
    def tower(params: Any, vectors: Any, inputs: Any) -> Any:
        x = vectors["item"][inputs["item"]]
        return (x @ params["w"]).sum(1) + jnp.sqrt(jnp.abs(params["v"][0, 0]))

    step, batch = make(tower, rows=["item"], check_gradients=True), some_batch(3)
    step(batch)
    before, table = jax.tree.map(np.asarray, step.state.tree), rows_of(step).clone()
    ids = batch["item"]
    assert isinstance(ids, torch.Tensor)
    faulty = {**batch, "label": torch.where(ids == ids[5], torch.nan, batch["label"])}  # type: ignore[arg-type]
    named = rf"nothing was updated: feature 'item' of the table 'item' \(\d+ of \d+ vectors, ids \[{int(ids[5])}\]\)"
    with pytest.raises(FloatingPointError, match=rf"loss of nan, and {named}, parameter \['v'\] of the tower, parame"):
        step(faulty)
    jax.tree.map(np.testing.assert_array_equal, step.state.tree, before)
    assert torch.equal(rows_of(step), table)
    # The first batch of an update has added its gradients before the second one is refused.
    with pytest.raises(FloatingPointError, match=rf"loss of nan, and {named}"):
        step(batch, faulty)
    jax.tree.map(np.testing.assert_array_equal, step.state.tree, before)
    step(batch)
    other = make(tower, rows=["item"])
    other(batch)
    other(batch)
    assert torch.equal(rows_of(step), rows_of(other))
    weights, state = step.state.tree
    step.state.tree = {**weights, "v": weights["v"].at[0, 0].set(0)}, state  # the derivative of the root is infinite
    with pytest.raises(FloatingPointError, match=r"nothing was updated: parameter \['v'\] of the tower$"):
        step(batch)


def heads(params: Any, vectors: Any) -> Any:
    hidden = jnp.tanh(vectors["item"] @ params["w"])
    return {"click": (hidden @ params["v"])[:, 0], "rating": hidden.sum(1)}


def squares(outputs: Any, labels: Any) -> Any:
    return (outputs - labels) ** 2


def two_objectives(**more: Any) -> dict[str, Objective]:
    rating = Objective(loss=squares, label="stars", weight=0.25, link=lambda outputs: outputs, groups="user")
    return {"click": Objective(loss=BCE), "rating": rating} | more


def with_stars(seed: int) -> Batch:
    batch = some_batch(seed)
    assert isinstance(batch["item"], torch.Tensor)
    return {**batch, "stars": (batch["item"] % 2).float()}


def test_several_objectives_are_summed_by_weight() -> None:
    # One loss over both columns of outputs and labels does the same.
    def stacked(params: Any, vectors: Any) -> Any:
        outputs = heads(params, vectors)
        return jnp.stack([outputs["click"], outputs["rating"]], 1)

    def sum_of_both(outputs: Any, labels: Any) -> Any:
        return BCE(outputs[:, 0], labels[:, 0]) + 0.25 * squares(outputs[:, 1], labels[:, 1])

    step, twin = make(heads, two_objectives(), metrics={"auc": AUC()}), make(stacked, sum_of_both, label="both")
    for seed in range(4):
        batch = with_stars(seed)
        labels = [batch[name] for name in ("label", "stars")]
        figures, expected = step(batch), twin({**batch, "both": torch.stack(labels, 1)})  # type: ignore[arg-type]
        assert_near(figures["loss"], expected["loss"])
        assert_near(figures["loss/click"] + 0.25 * figures["loss/rating"], figures["loss"])
        assert {"click.auc", "rating.auc"} <= figures.keys()
    assert_near(step.state.tree[0], twin.state.tree[0], OF_ADAM)
    assert_near(rows_of(step), rows_of(twin), OF_ADAM)
    found = step.predict(with_stars(9))
    vectors, _ = step.tables.lookup({"item": with_stars(9)["item"]}, train=False)
    outputs = heads(step.state.tree[0], vectors)
    assert_near(found["rating"].scores, outputs["rating"])
    assert_near(found["click"].scores, jax.nn.sigmoid(outputs["click"]))
    assert found["click"].groups is None
    assert torch.equal(found["rating"].groups, with_stars(9)["user"])  # type: ignore[arg-type]
    assert torch.equal(found["rating"].labels, with_stars(9)["stars"])  # type: ignore[arg-type]


def test_one_objective_names_its_columns() -> None:
    step = make(loss=Objective(loss=BCE, label="clicked", groups="user"))
    batch = some_batch(0)
    figures = step({"item": batch["item"], "clicked": batch["label"]})
    assert set(figures) == {"loss"}
    assert torch.equal(figures["loss"], make()(batch)["loss"])


def test_several_objectives_in_a_trainer() -> None:
    batches = [with_stars(seed) for seed in range(12)]
    metrics = {"click": {"auc": AUC()}, "rating": {"gauc": GAUC()}}
    step = make(heads, two_objectives(), metrics=metrics)
    figures = Trainer(step, batches, batches, metrics={"auc": AUC()}).fit([Train(epochs=6), Evaluate()])["eval"]
    assert figures["click.auc"] > 0.95
    assert figures["rating.auc"] > 0.95


def test_bad_objectives() -> None:
    with pytest.raises(ValueError, match="at least one objective"):
        make(heads, {})
    with pytest.raises(TypeError, match="objective 'click': must be a pipelines.Objective, got a function"):
        make(heads, {"click": BCE})
    with pytest.raises(ValueError, match="objective 'own': must have a loss, got None"):
        make(heads, {"own": SimpleNamespace(loss=None, weight=1.0)})
    with pytest.raises(ValueError, match="objective 'late': the weight must be a number.*TorchStep"):
        make(heads, two_objectives(late=Objective(loss=BCE, weight=lambda step: step / 10)))
    with pytest.raises(ValueError, match=r"metrics of \['buy'\], but the objectives are \['click', 'rating'\]"):
        make(heads, two_objectives(), metrics={"buy": {"auc": AUC()}})
    with pytest.raises(KeyError, match=r"must return a dict with outputs for each, got \['click', 'rating'\]"):
        make(heads, two_objectives(buy=Objective(loss=BCE)))(with_stars(0))
    with pytest.raises(KeyError, match="the label column 'stars' must be a column of the batch"):
        make(heads, two_objectives())(some_batch(0))


def cut(batch: Batch, *ends: int) -> list[Batch]:
    return [
        {name: column[a:b] for name, column in batch.items()}  # type: ignore[index]
        for a, b in zip((0, *ends), (*ends, None), strict=True)
    ]


def test_accumulated_batches_have_the_gradient_of_one_large_batch() -> None:
    batch = some_batch(0)
    results = []
    for batches in ([batch], cut(batch, 20), cut(batch, 7, 7, 20)):
        step = make(metrics={"auc": AUC()})
        figures = step(*batches)
        auc = figures.pop("auc").compute()
        results.append((figures, step.state.tree[0], rows_of(step), auc))
        assert step.engines[0].tables[0].step == 1
    for result in results[1:]:
        assert_near(result[0], results[0][0])
        assert_near(result[1], results[0][1], OF_ADAM)
        assert_near(result[2], results[0][2], OF_ADAM)
        assert result[3] == results[0][3]


def test_a_failed_batch_leaves_no_gradients() -> None:
    batch = some_batch(0)
    failed, fresh = make(), make()
    with pytest.raises(KeyError, match="the label column"):
        failed(batch, {"item": batch["item"]})
    failed(*cut(batch, 20))
    fresh(*cut(batch, 20))
    assert torch.equal(rows_of(failed), rows_of(fresh))


def test_trainer_accumulates() -> None:
    data = [some_batch(seed) for seed in range(4)]
    ours, theirs = make(), make()
    Trainer(ours, data, accumulate=2).fit([Train(epochs=1)])
    for pair in (data[:2], data[2:]):
        theirs(*pair)
    assert torch.equal(rows_of(ours), rows_of(theirs))


def test_bad_arguments_and_columns() -> None:
    with pytest.raises(TypeError, match="tables must be JaxTables"):
        JaxStep(mlp, params(), BCE, optax.adam(0.1), tables_of().engine)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be an optax transformation.*belongs to JaxTables"):
        JaxStep(mlp, params(), BCE, None, tables_of())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss must be a function .* got None"):
        make(loss=None)
    batch = some_batch(0)
    with pytest.raises(ValueError, match="an update needs at least one batch, got none"):
        make()()
    with pytest.raises(TypeError, match="add_gradients: the tables have no optimizer"):
        JaxStep(mlp, params(), BCE, optax.adam(0.1), JaxTables(tables_of().engine))(batch, batch)
    with pytest.raises(KeyError, match="the label column 'label' must be a column of the batch"):
        make()({"item": batch["item"]})
    with pytest.raises(TypeError, match="the input column 'price' must be a dense column"):
        make(lambda p, v, i: 0, inputs=["price"])({**batch, "price": RaggedTensor.from_lists([[1]] * 32)})
    with pytest.raises(ValueError, match=r"label 'label': integers must fit int32 .* got 0 to 1099511627776"):
        make()({**batch, "label": torch.tensor([0] * 31 + [2**40])})
    with pytest.raises(ValueError, match=r"loss must return a scalar or a loss for each row, \[32\], got \[32, 2\]"):
        make(loss=lambda outputs, labels: jnp.stack([outputs, labels], 1))(batch)
    with pytest.raises(ValueError, match="training metrics need labels"):
        make(loss=lambda outputs: outputs.mean(), label=None, metrics={"auc": AUC()})(batch)


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, optax, torch, torch.distributed as dist
from recis_hybrid import optim
from recis_hybrid.bridge.jax_led import JaxStep, JaxTables
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Normal
from tests.support.near import OF_ADAM, assert_near

generator = torch.Generator().manual_seed(0)
ids = torch.randint(0, 200, (7, 48, 3), generator=generator)
labels = (ids[:, :, 0] % 2).float()

def mlp(params, vectors, inputs):
    x = vectors["row"][inputs["row"]].sum(1) + vectors["bag"]
    return (jnp.tanh(x @ params["w"]) @ params["v"])[:, 0]

def params_of(rank):
    random = np.random.default_rng(rank)  # rank 0's count
    return {"w": jnp.array(random.normal(0, 0.5, (4, 8)), "f"), "v": jnp.array(random.normal(0, 0.5, (8, 1)), "f")}

def train(group, rank, ranks):
    configs = {name: EmbeddingConfig(dim=4, initializer=Normal(0, 0.5)) for name in ("row", "bag")}
    spec = optim.Adagrad.spec(initial_accumulator_value=0.1)
    engine = EmbeddingEngine(configs, optimizer=spec, group=group, seed=1)
    tables = JaxTables(engine, engine.make_optimizer(lr=0.1), rows=["row"])
    step = JaxStep(mlp, params_of(rank), optax.sigmoid_binary_cross_entropy, optax.adagrad(0.05), tables)
    cuts = [0, 30, 48] if ranks == 2 else [0, 48]  # unequal shares
    data = [
        {name: column[cuts[rank]:cuts[rank + 1]] for name, column in {"row": part, "bag": part + 7, "label": y}.items()}
        for part, y in zip(ids, labels)
    ]
    if ranks == 2 and rank == 1:  # it runs out of batches before the other
        data[-1] = {name: column[:0] for name, column in data[-1].items()}
    if ranks == 1:
        data[-1] = {name: column[:30] for name, column in data[-1].items()}
    for batch in data * 2:
        step(batch)
    step.expect([[30, 18]] * 2 if ranks == 2 else [[48]] * 2)
    step(*data[:2])
    return step, engine

dist.init_process_group("gloo")
rank = dist.get_rank()
shared, engine = train(None, rank, 2)
leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(shared.state.tree)]
gathered = [None, None]
dist.all_gather_object(gathered, [leaf.tobytes() for leaf in leaves])
assert gathered[0] == gathered[1]
rows = [None, None]
dist.all_gather_object(rows, [
    dict(zip(columns["ids"].tolist(), columns["embedding"].tolist()))
    for table in engine.tables for member in range(len(table.members)) for columns in [table.export(member)]
])
checked = JaxStep(mlp, params_of(rank), optax.sigmoid_binary_cross_entropy, optax.sgd(0.1), JaxTables(
    engine, optim.SGD(engine.parameters(), lr=0.1), rows=["row"]), check_gradients=True)
batch = {"row": ids[0], "bag": ids[0], "label": labels[0]}
checked(batch)
try:
    checked({**batch, "label": labels[0] * (float("nan") if rank else 1.0)})
except FloatingPointError as error:
    assert ("feature 'bag'" in str(error)) == (rank == 1) == ("those of another rank" not in str(error)), error
else:
    raise AssertionError("no error")
checked(batch)
dist.destroy_process_group()
alone, single = train(False, 0, 1)
assert_near(shared.state.tree[0], alone.state.tree[0], 4096)
expected = [table.export(member) for table in single.tables for member in range(len(table.members))]
for number, columns in enumerate(expected):
    merged = rows[0][number] | rows[1][number]
    assert merged.keys() == set(columns["ids"].tolist())
    got = torch.tensor([merged[key] for key in columns["ids"].tolist()])
    assert_near(got, columns["embedding"], 4096)
print("agrees")
"""


def test_two_ranks_agree_with_one_process(tmp_path: Path) -> None:
    done = on_two_ranks(PROGRAM, tmp_path)
    assert done.stdout.split() == ["agrees"] * 2, done.stderr
