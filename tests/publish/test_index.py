"""Vector indexes, read back by faiss alone."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from recis_hybrid import optim
from recis_hybrid.app import cli
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.publish.index import HNSW, IVF, Flat, IndexReport, table_vectors, tower_vectors, write_index
from recis_hybrid.saver import Saver
from recis_hybrid.saver.checkpoint.chain import StoredCheckpoint
from tests.support.configs import small_config

faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")

ITEMS, DIM = 3000, 16


def items(rows: int = ITEMS, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids over the whole range of 64 bits, -1 among them, and vectors in groups, as those of items are."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(rows) * 6_148_914_691_236_517 - 2**63
    ids[7] = -1
    centers = torch.randn(50, dim, generator=generator)
    of = torch.randint(0, 50, (rows,), generator=generator)
    return ids, centers[of] + 0.5 * torch.randn(rows, dim, generator=generator)


def nearest(
    ids: npt.NDArray[np.int64], vectors: npt.NDArray[np.float64], queries: npt.NDArray[np.float64], k: int
) -> npt.NDArray[np.int64]:
    """Return the ids with the highest inner products, by brute force in float64."""
    return ids[np.argsort(-(queries @ vectors.T), axis=1)[:, :k]]


@pytest.mark.parametrize("metric", ["inner_product", "cosine"])
@pytest.mark.parametrize("index", [HNSW(), IVF(), Flat()], ids=["hnsw", "ivf", "flat"])
def test_the_defaults_find_the_nearest_items(tmp_path: Path, index: Any, metric: Any) -> None:
    ids, vectors = items()
    queries = np.random.default_rng(1).normal(size=(200, DIM)).astype(np.float32)
    pieces = [(ids[first : first + 700], vectors[first : first + 700]) for first in range(0, ITEMS, 700)]
    report = write_index(tmp_path / "items.faiss", pieces, index=index, metric=metric, queries=queries)
    exact = vectors.double().numpy()
    if metric == "cosine":
        exact = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    # The index alone, without the process that built it: ids and the parameters of the search are in the file.
    scores, found = faiss.read_index(str(tmp_path / "items.faiss")).search(queries, 10)
    expected = nearest(ids.numpy(), exact, queries.astype(np.float64), 10)
    hits = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), expected.tolist(), strict=True)])
    assert hits >= 0.95
    # Equally near items, within the rounding of float32, count as found in the report only.
    assert report.recall == pytest.approx(hits, abs=0.002)
    if index.kind == "flat":
        assert report.recall == 1.0
        sums = np.abs(queries[:, :, None] * exact.T[None, :, :].astype(np.float32)).sum(1).max()
        assert np.abs(scores[:, 0] - (queries @ exact.T).max(1)).max() <= DIM * np.finfo(np.float32).eps * sums


@pytest.mark.parametrize("index", [HNSW(), IVF(), Flat()], ids=["hnsw", "ivf", "flat"])
def test_every_id_is_kept(tmp_path: Path, index: Any) -> None:
    ids, vectors = items(500)
    vectors = torch.nn.functional.normalize(vectors)  # so that each item is the nearest to itself
    write_index(tmp_path / "items.faiss", [(ids, vectors)], index=index, recall=1.0)
    _, found = faiss.read_index(str(tmp_path / "items.faiss")).search(vectors.numpy(), 1)
    assert found[:, 0].tolist() == ids.tolist()


def test_the_search_widens_until_the_recall_is_reached(tmp_path: Path) -> None:
    vectors = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0))
    pieces = [(torch.arange(2000), vectors)]
    narrow = write_index(tmp_path / "a", pieces, index=IVF(lists=50, probes=1), recall=0.0)
    wide = write_index(tmp_path / "a", pieces, index=IVF(lists=50, probes=1), recall=0.9)
    assert narrow.parameters == {"lists": 50, "probes": 1}
    assert narrow.recall < 0.9 <= wide.recall
    assert wide.parameters["probes"] in (2, 4, 8, 16, 32, 50)
    assert faiss.downcast_index(faiss.read_index(str(tmp_path / "a")).index).nprobe == wide.parameters["probes"]
    graph = HNSW(links=2, ef_construction=2, ef_search=1)
    found = write_index(tmp_path / "a", pieces, index=graph, recall=0.0)
    assert found.parameters["ef_search"] == 10  # fewer candidates than neighbors make no sense
    with pytest.warns(RuntimeWarning, match=r"recall@10 is 0\.\d+, below 1.0, with .*use another kind"):
        write_index(tmp_path / "a", pieces, index=graph, recall=1.0)


def test_the_report_describes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "items.faiss"
    report = write_index(path, [items(40)], index=Flat(), k=100, source={"step": 3})
    assert report == IndexReport(
        kind="flat",
        parameters={},
        metric="inner_product",
        rows=40,
        dim=DIM,
        k=40,  # there are no more items
        recall=1.0,
        queries=40,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        source={"step": 3},
    )
    assert IndexReport(**json.loads((tmp_path / "items.faiss.json").read_text())) == report
    assert sorted(each.name for each in tmp_path.iterdir()) == ["items.faiss", "items.faiss.json"]


def test_equal_vectors_yield_equal_bytes_on_one_thread(tmp_path: Path) -> None:
    reports = [write_index(tmp_path / name, [items()], threads=1) for name in ("a", "b")]
    assert reports[0] == reports[1]


def test_the_number_of_threads_is_restored(tmp_path: Path) -> None:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        write_index(tmp_path / "a", [items(20)], threads=1)
        with pytest.raises(ValueError, match="more than once"):
            write_index(tmp_path / "a", [items(20), items(20)], threads=1)
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)


def test_vectors_of_a_table(tmp_path: Path) -> None:
    engine = EmbeddingEngine(
        {"item": EmbeddingConfig(dim=DIM), "user": EmbeddingConfig(dim=4)}, optimizer=optim.SGD, seed=1
    )
    saver, optimizer = Saver(tmp_path, keep=None), optim.SGD(engine.parameters(), lr=1.0)
    ids = items(300)[0]
    for step, part in ((1, ids), (2, ids[:50])):  # the second checkpoint is incremental
        engine({"item": part, "user": part[:9]})["item"].square().sum().backward()
        optimizer.step()
        saver.save(step, {"engine": engine, "note": 1}, delta=True)
    checkpoint = StoredCheckpoint(tmp_path, 2)
    assert checkpoint.manifest.previous is not None
    write_index(tmp_path / "items.faiss", table_vectors(checkpoint, "item"), index=Flat())
    engine.eval()
    index = faiss.read_index(str(tmp_path / "items.faiss"))
    vectors = engine({"item": ids, "user": ids[:1]})["item"].detach().numpy()
    order = {each: number for number, each in enumerate(faiss.vector_to_array(index.id_map).tolist())}
    rows = index.index.reconstruct_n(0, 300)[[order[each] for each in ids.tolist()]]
    assert np.array_equal(rows, vectors)
    with pytest.raises(ValueError, match=r"must have one table 'itm', has 0; tables: \['item', 'user'\]"):
        next(table_vectors(checkpoint, "itm"))


def test_vectors_of_a_tower(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = torch.nn.Linear(4, DIM)
    batches = [{"item": torch.arange(first, first + 8), "x": torch.randn(8, 4)} for first in (0, 8)]
    pieces = tower_vectors(lambda batch: tower(batch["x"]), batches, "item")
    report = write_index(tmp_path / "items.faiss", pieces, index=Flat(), metric="cosine")
    assert (report.rows, report.dim) == (16, DIM)
    query = torch.nn.functional.normalize(tower(batches[1]["x"][3:4])).detach().numpy()
    scores, found = faiss.read_index(str(tmp_path / "items.faiss")).search(query, 1)
    assert found.tolist() == [[11]]
    assert abs(float(scores[0, 0]) - 1) <= DIM * np.finfo(np.float32).eps
    with pytest.raises(ValueError, match=r"must have 'id', int64 \[B\], it has \['item', 'x'\]"):
        next(tower_vectors(tower, batches, "id"))


@pytest.mark.parametrize(
    ("pieces", "options", "message"),
    [
        ([], {}, "there are no items"),
        ([(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2))], {}, "there are no items"),
        ([(torch.tensor([5, 6]), torch.tensor([[1.0], [float("nan")]]))], {}, "the item 6 is not finite"),
        ([(torch.tensor([5, 5]), torch.ones(2, 1))], {}, "the item 5 occurs more than once"),
        ([(torch.tensor([5]), torch.ones(1, 1)), (torch.tensor([5]), torch.ones(1, 1))], {}, "more than once"),
        ([(torch.tensor([5]), torch.ones(1, 1)), (torch.tensor([6]), torch.ones(1, 2))], {}, r"piece 1: .* \[1, 1\]"),
        ([(torch.tensor([5]), torch.ones(1, 1, dtype=torch.int64))], {}, "floating point"),
        ([(torch.tensor([5], dtype=torch.int32), torch.ones(1, 1))], {}, r"ids must be int64 \[m\], got torch.int32"),
        ([items(50)], {"metric": "l2"}, "metric must be"),
        ([items(50)], {"recall": 1.5}, "recall must be from 0 to 1"),
        ([items(50)], {"k": 0}, "k must be"),
        ([items(50)], {"queries": np.ones((3, 5))}, r"queries must be finite numbers \[q, 16\], got \[3, 5\]"),
        ([items(50)], {"index": IVF(lists=51)}, "lists must be from 1 to the number of items, 50, got 51"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path: Path, pieces: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_index(tmp_path / "items.faiss", pieces, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_an_error_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"install recis_hybrid\[retrieval\]"):
        write_index(tmp_path / "a", [items(9)])


def test_the_command_writes_an_index_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, optimizer={"sparse": "adam"})
    assert cli.main(["train", str(config), "--quiet"]) == 0
    capsys.readouterr()
    run, path = str(tmp_path / "run"), str(tmp_path / "users.faiss")
    assert cli.main(["export", run, "--index", path, "--table", "user", "--kind", "flat", "--metric", "cosine"]) == 0
    text = capsys.readouterr().out
    assert "7 items of step 4, flat (exact), cosine, recall@7 1.0000 of 7 items as queries" in text
    assert cli.main(["export", run, "--index", path, "--table", "user", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["kind"], report["metric"], report["rows"], report["dim"]) == ("hnsw", "inner_product", 7, 4)
    assert report["source"]["sha256"] == Saver(run).digest(4)
    index = faiss.read_index(path)
    assert sorted(faiss.vector_to_array(index.id_map).tolist()) == list(range(7))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", run, "--index", path])
    assert "--index needs --table NAME" in capsys.readouterr().err
    for words, message in (
        ([run, "--index", path, "--table", "x"], "must have one table 'x', has 0"),
        ([run, "--index", path, "--table", "user", "--dtype", "int8"], "an index holds float32; omit --dtype"),
    ):
        assert cli.main(["export", *words]) == 1
        assert message in capsys.readouterr().err
    for words, message in (
        ([run, "out", "--table", "user"], "--table is for --index"),
        ([run], "name one target: OUT, --bundle DIR or --index FILE"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["export", *words])
        assert message in capsys.readouterr().err


def test_the_code_blocks_of_the_guide_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (root / "docs" / "retrieval.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 3
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "docs/retrieval.md", "exec"), names)
    assert names["report"].recall >= 0.95
    # A user of the page likes the items of his own group, of which there are four.
    groups = np.arange(200) % 4
    assert (groups[names["found"]] == 3).mean() > 0.9
