"""What RecIS saves, written here in its layout: names of blocks, blanks and all, by hand."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine
from recis_hybrid.saver import CheckpointError, CorruptCheckpoint, Saver
from recis_hybrid.saver.cli import main
from recis_hybrid.saver.recis_import import import_recis

DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
IDS = torch.tensor([2**52 - 1, 0, 7, 123456789, 5])


def write_file(path: Path, blocks: dict[str, Tensor]) -> None:
    """As its writer does: one after another in order, the header padded with blanks to a multiple of 8 beyond it."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in blocks.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (8 - len(text) % 8)
    path.write_bytes(struct.pack("<q", len(text)) + text + data)


def write(folder: Path, files: list[dict[str, Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{n:06d}-of-{len(files):06d}.safetensors" for n in range(len(files))]
    for name, blocks in zip(names, files, strict=True):
        write_file(folder / name, blocks)
    block_index = {block: n for n, blocks in enumerate(files) for block in blocks}
    index = {"block_index": block_index, "file_index": {name: n for n, name in enumerate(names)}}
    (folder / "index").write_text(json.dumps(index))
    (folder / "tensorkey.json").write_text("{}")
    (folder / "extra.pt").write_bytes(b"a pickle, which nobody opens")
    return folder


def tables() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "ids": IDS, "embedding": torch.randn(5, 4), "exp_avg": torch.randn(5, 4), "exp_avg_sq": torch.rand(5, 4),
        "w": torch.randn(2, 4), "b": torch.randn(2),
    }  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two ranks, two files each; the table user on both, item with nothing on the second."""
    t = tables()

    def blocks(table: str, rank: int, rows: slice) -> dict[str, Tensor]:
        slots = {
            "id": "ids", "embedding": "embedding", "sparse_adamw_tf_exp_avg": "exp_avg",
            "sparse_adamw_tf_exp_avg_sq": "exp_avg_sq", "step": "ids",
        }  # fmt: skip
        return {f"{table}.{slot}/part_{rank}_2": t[column][rows] for slot, column in slots.items()}

    one, two = blocks("emb.user", 0, slice(0, 3)), blocks("emb.user", 1, slice(3, 5))
    three, four = blocks("item", 0, slice(1, 4)), blocks("item", 1, slice(0, 0))
    return write(tmp_path / "recis", [one | {"tower.weight^ ": t["w"]}, three, two | four, {"tower.bias^ ": t["b"]}])


def test_tables_and_towers_come_over(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-recis", "--json", str(source), str(tmp_path / "run"), "--step", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "run" / "step_000007")
    assert main(["verify", str(tmp_path / "run")]) == 0
    t = tables()
    config = EmbeddingConfig(dim=4)
    engine = EmbeddingEngine({"emb.user": config, "item": config}, optimizer_state=optim.Adam.row_state())
    model = nn.ModuleDict({"tower": nn.Linear(4, 2)})
    assert Saver(tmp_path / "run").load(engine=engine, model=model) == 7
    assert torch.equal(model["tower"].weight, t["w"])
    assert torch.equal(model["tower"].bias, t["b"])
    for table, rows in (("emb.user", slice(0, 5)), ("item", slice(1, 4))):
        member = [m.name for m in engine.tables[0].members].index(table)
        found = engine.tables[0].export(member, t["ids"][rows])
        assert len(engine.tables[0].ids(member)) == rows.stop - rows.start
        for column in ("embedding", "exp_avg", "exp_avg_sq"):
            assert torch.equal(found[column], t[column][rows])
    # Under another name, and for another optimizer.
    other = EmbeddingEngine({"member": config}, optimizer_state=optim.Adagrad.row_state())
    with pytest.raises(CheckpointError, match=r"rename='user' matches no name in the checkpoint; .* 'emb.user'"):
        Saver(tmp_path / "run").load_some(rename={"emb.*": "*", "user": "member"}, strict=False, engine=other)
    Saver(tmp_path / "run").load_some(rename={"emb.user": "member"}, only="member", strict=False, engine=other)
    assert torch.equal(other.tables[0].export(0, t["ids"])["embedding"], t["embedding"])


def test_other_slots_by_name_and_tables_with_dots(tmp_path: Path) -> None:
    t = tables()
    blocks = {"a@b.c.id/part_0_1": t["ids"], "a@b.c.embedding/part_0_1": t["embedding"].bfloat16()}
    source = write(tmp_path / "recis", [blocks | {"a@b.c.beta_exp/part_0_1": t["exp_avg"][:, :1]}])
    directory = import_recis(source, tmp_path / "run", slots={"beta_exp": "sum"})
    manifest = json.loads((directory / "manifest.json").read_text())
    table = manifest["parts"]["engine"]["tables"]["a@b.c"]
    assert [c["name"] for c in table["columns"]][:3] == ["ids", "embedding", "sum"]
    assert table["meta"] == {"dim": 4, "dtype": "bfloat16", "optimizer_state": [["sum", 1, "float32"]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t.id/part_0_2": IDS}, "slot 'id': must have blocks of 2 ranks, has \\[0\\]|blocks of"),
        ({"t.id/part_0_1": IDS[:3]}, "as many rows as there are ids"),
        ({"t.id/part_0_1": IDS.float()}, "must have slots 'id', int64"),
        ({"t.id/part_0_1": torch.tensor([1, 2, 3, 1, 5])}, "an id must have one row, 1 has more"),
        ({"t.embedding/part_0_1": None}, "must have slots 'id', int64 .n., and 'embedding', has \\['id'\\]"),
        ({"t.id/part_0_1": None}, "and 'embedding', has \\['embedding'\\]"),
        ({"t.id/part_1_3": IDS}, "blocks of"),
    ],
)
def test_blocks_that_are_no_table(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    t = tables()
    blocks = {"t.id/part_0_1": t["ids"], "t.embedding/part_0_1": t["embedding"], **change}
    source = write(tmp_path / "recis", [{name: tensor for name, tensor in blocks.items() if tensor is not None}])
    with pytest.raises(CheckpointError, match=message):
        import_recis(source, tmp_path / "run")
    assert Saver(tmp_path / "run").steps() == []


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "must be JSON that says"),
        ("[]", "must be JSON that says"),
        ('{"file_index": {"../x": 0}, "block_index": {}}', "leads to '../x'"),
        ('{"file_index": {"absent": 0}, "block_index": {}}', "absent is missing"),
        ('{"file_index": {}, "block_index": {"a": 1}}', "must be JSON that says"),
        ('{"file_index": {"index": 0}, "block_index": {"a": 0}}', "must be a safetensors file"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "index").write_text(index)
    with pytest.raises(CorruptCheckpoint, match=message):
        import_recis(tmp_path, tmp_path / "run")


def test_what_is_no_checkpoint_of_recis(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-recis", str(tmp_path / "none"), str(tmp_path / "run")]) == 1
    assert "holds no file 'index'" in capsys.readouterr().err
    (source / "model-000001-of-000004.safetensors").write_bytes(b"12345678")
    assert main(["import-recis", str(source), str(tmp_path / "run")]) == 1
    assert "model-000001-of-000004.safetensors" in capsys.readouterr().err
