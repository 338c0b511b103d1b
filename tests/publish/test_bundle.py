"""Bundles of users' own models: lookups of every form bitwise as the engine's, and models that cannot be bundles."""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.columnio import Dense, Ragged as RaggedSpec, Text
from recis_hybrid.embedding import (
    Constant,
    EmbeddingConfig,
    EmbeddingEngine,
    KaimingUniform,
    Normal,
    TruncatedNormal,
    Uniform,
    XavierNormal,
)
from recis_hybrid.features import Bucketize, Feature, FeatureEngine, Hash, Mod, ToDense, Tokenize, Truncate
from recis_hybrid.publish import PublishError, write_bundle
from recis_hybrid.ragged import Batch, RaggedTensor
from recis_hybrid.serving import Bundle, Ragged, ServingError

CONFIGS = {
    "sum": EmbeddingConfig(dim=4, table="shared", initializer=Uniform(-1, 2)),
    "mean": EmbeddingConfig(dim=4, table="shared", combiner="mean", initializer=Uniform(-1, 2), unknown="zeros"),
    "sqrtn": EmbeddingConfig(dim=7, combiner="sqrtn", initializer=TruncatedNormal(0.5, 2.0, -1.5, 0.5)),
    "max": EmbeddingConfig(dim=3, combiner="max", max_length=2, initializer=XavierNormal()),
    "tile": EmbeddingConfig(dim=2, combiner="tile", max_length=3, initializer=KaimingUniform()),
    "short": EmbeddingConfig(dim=5, combiner="mean", max_length=2, dtype=torch.bfloat16, initializer=Normal(0.1, 3.0)),
    "half": EmbeddingConfig(dim=6, dtype=torch.float16, initializer=Normal(0.0, 2.0)),
    "constant": EmbeddingConfig(dim=1, initializer=Constant(0.25)),
    "named": EmbeddingConfig(dim=4, combiner="sqrtn", weights="weight", table="shared", initializer=Uniform(-1, 2)),
    "each": EmbeddingConfig(dim=4, combiner=None),
    "fixed": EmbeddingConfig(dim=4, combiner="mean", max_length=2),
    "wide": EmbeddingConfig(dim=4, combiner="max"),
    "hashed": EmbeddingConfig(dim=8),
}
NUMBERS = ("age", "bits")
FEATURES = [
    Feature("hashed", ops=[Hash("farm"), Mod(50)], source="word"),
    Feature("bits", ops=[Truncate(2), ToDense(2, -1)], source="sum"),
    Feature("age", ops=[Bucketize([0.3, 0.6])], source="share"),
    Feature("sum"),
]


class Everything(nn.Module):
    """Returns a score and all of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.3, 0.4, 3))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        flat = torch.cat([each.float().flatten(1) if each.dim() > 1 else each.float()[:, None] for each in inputs], 1)
        return torch.sigmoid(flat[:, :3] @ self.weight), flat


def lists(random: np.random.Generator, rows: int, most: int, weighted: bool = False) -> RaggedTensor:
    lengths = random.integers(0, most, rows)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    count = int(offsets[-1])
    weights = None
    if weighted:
        weights = torch.from_numpy(random.choice(np.array([0.0, 1.0, 0.3, -0.5]), count).astype(np.float32))
    return RaggedTensor(torch.from_numpy(random.integers(-20, 20, count)), offsets, weights)


def batch_of(seed: int, rows: int) -> Batch:
    random = np.random.default_rng(seed)
    named = lists(random, rows, 4)
    weight = torch.from_numpy(random.random(named.values.numel()).astype(np.float32))
    return {
        "sum": lists(random, rows, 60),
        "mean": lists(random, rows, 5, weighted=True),
        "sqrtn": lists(random, rows, 5, weighted=True),
        "max": lists(random, rows, 5),
        "tile": lists(random, rows, 6),
        "short": lists(random, rows, 6, weighted=True),
        "half": torch.from_numpy(random.integers(-20, 20, rows)),
        "constant": torch.from_numpy(random.integers(-20, 20, rows).astype(np.int32)),
        "named": named,
        "weight": RaggedTensor(weight, named.offsets),
        "each": torch.from_numpy(random.integers(-20, 20, (rows, 2))),
        "fixed": torch.from_numpy(random.integers(-20, 20, (rows, 3))),
        "wide": torch.from_numpy(random.integers(-20, 20, (rows, 6))),
        "word": RaggedTensor.from_strings([f"w{random.integers(60)}" for _ in range(rows)]),
        "share": torch.from_numpy(random.random(rows)),
    }


def columns_of(batch: Batch) -> dict[str, Any]:
    """Return the columns of a request."""
    columns: dict[str, Any] = {}
    for name, column in batch.items():
        if not isinstance(column, RaggedTensor):
            columns[name] = column.numpy()
        elif column.dtype == torch.uint8:
            columns[name] = column.to_strings()
        else:
            weights = None if column.weights is None else column.weights.numpy()
            columns[name] = Ragged(column.values.numpy(), column.lengths().numpy(), weights)
    return columns


class Written:
    def __init__(self, folder: Path) -> None:
        self.features = FeatureEngine(FEATURES, keep=["share"])
        self.engine = EmbeddingEngine(CONFIGS, optimizer=optim.SGD, seed=3)
        self.tower = Everything()
        optimizer = optim.SGD(self.engine.parameters(), lr=0.5)
        for seed in range(2):
            half = {name: each for name, each in self.features(batch_of(seed, 5)).items()}
            outputs = self.engine(half)
            sum(output.square().sum() for output in outputs.values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        self.inputs = [*CONFIGS, *NUMBERS]
        self.path = write_bundle(
            folder,
            7,
            features=self.features,
            engine=self.engine,
            tower=self.tower,
            inputs=self.inputs,
            batch=batch_of(9, 6),
            outputs=("score", "inputs"),
            columns={"share": Dense(default=0.5), "sum": RaggedSpec(null_as_empty=True), "word": Text("w1")},
        )

    @torch.no_grad()
    def expected(self, batch: Batch) -> tuple[Tensor, Tensor]:
        computed = self.features(batch)
        vectors = self.engine.eval()(computed)
        found: tuple[Tensor, Tensor] = self.tower(*[vectors.get(name, computed.get(name)) for name in self.inputs])
        return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("written"))


@pytest.mark.parametrize(("seed", "rows"), [(10, 8), (11, 1), (12, 300), (13, 2), (14, 40)])
def test_lookups_are_bitwise_those_of_the_engine(written: Written, seed: int, rows: int) -> None:
    batch = batch_of(seed, rows)
    score, inputs = written.expected(batch)
    found = Bundle(written.path.parent).predict(columns_of(batch))
    np.testing.assert_array_equal(found["inputs"], inputs.numpy())
    np.testing.assert_allclose(found["score"], score.numpy(), rtol=0, atol=1e-6)


def test_defaults_of_columns_replace_nulls(written: Written) -> None:
    bundle = Bundle(written.path.parent)
    columns = columns_of(batch_of(10, 3))
    lists_of_sum = batch_of(10, 3)["sum"].to_lists()  # type: ignore[union-attr]
    explicit = {**columns, "share": [0.5, 0.5, 0.1], "sum": [[], lists_of_sum[1], []], "word": ["w1", "w2", "w1"]}
    nulls = {**columns, "share": [None, None, 0.1], "sum": [None, lists_of_sum[1], []], "word": [None, "w2", None]}
    np.testing.assert_array_equal(bundle.predict(nulls)["inputs"], bundle.predict(explicit)["inputs"])


def test_weighted_rows_may_be_pairs(written: Written) -> None:
    bundle = Bundle(written.path.parent)
    batch = batch_of(10, 4)
    columns = columns_of(batch)
    mean = batch["mean"]
    assert isinstance(mean, RaggedTensor)
    assert mean.weights is not None
    weights = RaggedTensor(mean.weights, mean.offsets).to_lists()
    pairs = [list(zip(*each, strict=True)) for each in zip(mean.to_lists(), weights, strict=True)]
    np.testing.assert_array_equal(
        bundle.predict({**columns, "mean": pairs})["inputs"], bundle.predict(columns)["inputs"]
    )
    with pytest.raises(ServingError, match="column 'mean': every value needs a weight, got none"):
        bundle.predict({**columns, "mean": Ragged(columns["mean"].values, columns["mean"].lengths)})
    with pytest.raises(ServingError, match="'weight' must have one weight for each id of every row"):
        bundle.predict({**columns, "weight": Ragged(np.ones(1, np.float32), [1, 0, 0, 0])})


def test_updated_bundles_share_what_did_not_change(written: Written) -> None:
    bundle = Bundle(written.path.parent)

    class Ones:
        dim = 8

        def read(self, ids: Any) -> tuple[Any, Any]:
            return np.ones((len(ids), 8), np.float32), np.ones(len(ids), bool)

    newer = bundle.updated(Path("update"), 8, "abc", {"hashed": Ones()})
    columns = columns_of(batch_of(10, 4))
    first = 4 + 4 + 7 + 3 + 6 + 5 + 6 + 1 + 4 + 8 + 4 + 4
    old, new = bundle.predict(columns)["inputs"], newer.predict(columns)["inputs"]
    np.testing.assert_array_equal(new[:, first : first + 8], 1.0)
    old[:, first : first + 8] = 1.0
    np.testing.assert_array_equal(new, old)
    assert (newer.step, newer.digest, bundle.step) == (8, "abc", 7)


def test_models_that_cannot_be_bundles_are_refused(tmp_path: Path) -> None:
    batch: Batch = {"item": torch.tensor([1, 2]), "tags": RaggedTensor.from_lists([[1], [2, 3]])}

    def write(configs: dict[str, EmbeddingConfig], inputs: list[str], **changes: Any) -> None:
        settings = {"tower": Everything(), "features": None, "batch": batch, "outputs": ("score", "inputs"), **changes}
        write_bundle(tmp_path, 1, engine=EmbeddingEngine(configs), inputs=inputs, **settings)

    item = EmbeddingConfig(dim=4)
    nested = RaggedTensor.from_lists([[[1], [2]], [[3]]])
    for arguments, changes, message in (
        (({"item": item, "user": item}, ["item"]), {}, "inputs must name all features of the engine, .'user'. are"),
        (({"item": item}, ["item", "tags"]), {}, "feature 'tags' yields lists of any length.*end .* with ToDense"),
        (({"item": item}, ["item", "none"]), {}, "batch lacks the columns .'none'.; pass columns as the reader"),
        (({"item": replace(item, optional=True)}, ["item"]), {}, "features .'item'. are optional"),
        (({"tags": replace(item, combiner=None)}, ["tags"]), {}, "must have a row for each of the batch's 2 rows"),
        (({"item": item}, ["item"]), {"batch": {"item": nested}}, "A feature over lists of lists yields one vector"),
        (({"item": item}, ["item"]), {"batch": {"item": torch.tensor([1])}}, "1 rows, at least 2"),
        (({"item": item}, ["item"]), {"outputs": ("score",)}, r"the tower must return .'score'., .B. or .B, k. each"),
        (({"item": item}, ["item"]), {"tower": Untraceable()}, "tower Untraceable cannot be exported to ONNX"),
        (({"item": item}, ["item"]), {"tower": Drawing(), "outputs": ("score",)}, "computes other numbers in ONNX"),
    ):
        with pytest.raises(PublishError, match=message):
            write(*arguments, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["onnxscript", "onnxruntime"])
def test_a_missing_exporter_names_the_extra_that_has_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PublishError, match=f"needs {module} to be exported") as raised:
        write_bundle(
            tmp_path / "b",
            1,
            features=None,
            engine=EmbeddingEngine({"item": EmbeddingConfig(dim=4)}),
            tower=Everything(),
            inputs=["item"],
            batch={"item": torch.tensor([1, 2])},
            outputs=("score", "inputs"),
        )
    named = re.search(r"pip install 'recis_hybrid\[(\w+)\]'", str(raised.value))
    assert named is not None
    assert any(each.startswith(module) for each in extras[named[1]])


class Untraceable(nn.Module):
    """Depends on values, not only on shapes."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x.sum(1), x) if float(x.sum()) > 0 else (x.mean(1), x)


class Drawing(nn.Module):
    """Draws random numbers in evaluation, too."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) + torch.randn(x.shape[0])


def test_tokens_are_refused_by_name(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"red": 0, "[UNK]": 1}, "[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    engine = FeatureEngine([Feature("title", ops=[Tokenize(tmp_path, max_length=4)])])
    with pytest.raises(PublishError, match="feature 'title'.*which has no tokenizer. Tokenize before the request"):
        write_bundle(
            tmp_path / "b",
            1,
            features=engine,
            engine=EmbeddingEngine({"title": EmbeddingConfig(dim=4)}),
            tower=Everything(),
            inputs=["title"],
            batch={"title": RaggedTensor.from_strings(["red", "red"])},
        )
