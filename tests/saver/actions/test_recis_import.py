"""Checkpoints in the layout of RecIS, including the blanks in names of blocks."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, Unused
from recis_hybrid.features import Feature, FeatureEngine, Hash, Mod
from recis_hybrid.ragged import RaggedTensor
from recis_hybrid.saver import CheckpointError, CorruptCheckpoint, Saver
from recis_hybrid.saver.actions.recis_import import import_recis
from recis_hybrid.saver.cli import main
from tests.support.near import OF_ADAM, assert_near

DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
IDS = torch.tensor([-(2**62), 0, 7, 123456789, 5])


def write_file(path: Path, blocks: dict[str, Tensor]) -> None:
    """Write a file as RecIS does: blocks in order, the header padded with 1 to 8 blanks to a multiple of 8."""
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
    (folder / "extra.pt").write_bytes(b"a pickle, which is never opened")
    return folder


def tables() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "ids": IDS,
        "embedding": torch.randn(5, 4),
        "exp_avg": torch.randn(5, 4),
        "exp_avg_sq": torch.rand(5, 4),
        "w": torch.randn(2, 4),
        "b": torch.randn(2),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a checkpoint of two ranks: table user on both, item with no rows on the second."""
    t = tables()

    def blocks(table: str, rank: int, rows: slice) -> dict[str, Tensor]:
        slots = {
            "id": "ids",
            "embedding": "embedding",
            "sparse_adamw_tf_exp_avg": "exp_avg",
            "sparse_adamw_tf_exp_avg_sq": "exp_avg_sq",
            "step": "ids",
        }
        return {f"{table}.{slot}/part_{rank}_2": t[column][rows] for slot, column in slots.items()}

    one, two = blocks("emb.user", 0, slice(0, 3)), blocks("emb.user", 1, slice(3, 5))
    three, four = blocks("item", 0, slice(1, 4)), blocks("item", 1, slice(0, 0))
    return write(tmp_path / "recis", [one | {"tower.weight^ ": t["w"]}, three, two | four, {"tower.bias^ ": t["b"]}])


def test_tables_and_towers_are_imported(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-recis", "--json", str(source), str(tmp_path / "run"), "--step", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "run" / "step_000007")
    assert main(["verify", str(tmp_path / "run")]) == 0
    t = tables()
    config = EmbeddingConfig(dim=4)
    engine = EmbeddingEngine({"emb.user": config, "item": config}, optimizer=optim.Adam)
    model = nn.ModuleDict({"tower": nn.Linear(4, 2)})
    assert Saver(tmp_path / "run").load({"engine": engine, "model": model}) == 7
    assert torch.equal(model["tower"].weight, t["w"])
    assert torch.equal(model["tower"].bias, t["b"])
    for table, rows in (("emb.user", slice(0, 5)), ("item", slice(1, 4))):
        member = [m.name for m in engine.tables[0].members].index(table)
        found = engine.tables[0].export(member, t["ids"][rows])
        assert len(engine.tables[0].ids(member)) == rows.stop - rows.start
        for column in ("embedding", "exp_avg", "exp_avg_sq"):
            assert torch.equal(found[column], t[column][rows])
    # Under another name, for another optimizer.
    other = EmbeddingEngine({"member": config}, optimizer=optim.Adagrad)
    with pytest.raises(CheckpointError, match=r"rename='user' matches no name in the checkpoint; .* 'emb.user'"):
        Saver(tmp_path / "run").load_some({"engine": other}, rename={"emb.*": "*", "user": "member"}, strict=False)
    Saver(tmp_path / "run").load_some({"engine": other}, rename={"emb.user": "member"}, only="member", strict=False)
    assert torch.equal(other.tables[0].export(0, t["ids"])["embedding"], t["embedding"])


def save_towers(source: Path, tensors: dict[str, Tensor]) -> str:
    """Save towers as a pickle, as RecIS does; return the command in the error message."""
    torch.save(tensors, source / "model.pt")
    with pytest.raises(
        CheckpointError, match="model.pt: holds the towers as a pickle, which is never opened"
    ) as caught:
        import_recis(source, source.parent / "refused")
    assert not (source.parent / "refused").exists()
    command = re.search(r"\n  (cd .*)\n", str(caught.value))
    assert command is not None
    return command[1]


def test_towers_in_a_pickle_are_converted_first(source: Path, tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    towers = {"first": shared, "second": shared, "turned": torch.randn(4, 3).t(), "steps": torch.tensor(7)}
    command = save_towers(source, towers).replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-c", command], check=True, timeout=300)
    assert main(["import-recis", str(source), str(tmp_path / "run")]) == 0
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(value), False) for name, value in towers.items()})
    loaded = Saver(tmp_path / "run").load_some({"model": model}, exclude=["tower.*"])
    assert loaded.loaded == [f"model: {name}" for name in sorted(towers)]
    assert all(torch.equal(model[name], value) for name, value in towers.items())
    # A name in both places is ambiguous.
    save_file({"tower.bias": torch.zeros(2)}, source / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="'tower.bias' is in the index and in model.safetensors"):
        import_recis(source, tmp_path / "again", adam_step=7)


def test_tables_are_imported_without_towers_on_request(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_towers(source, {"a": torch.ones(1)})
    assert main(["import-recis", str(source), str(tmp_path / "run")]) == 1
    assert "model.pt: holds the towers as a pickle" in capsys.readouterr().err
    assert main(["import-recis", str(source), str(tmp_path / "run"), "--tables-only"]) == 0
    manifest = json.loads((tmp_path / "run" / "step_000000" / "manifest.json").read_text())
    assert list(manifest["parts"]) == ["engine"]


def recis_adam(tmp_path: Path, steps: int, **counters: Tensor) -> tuple[Path, dict[str, Any], Tensor]:
    """Return a table trained by Adam with a constant gradient for some steps, and its contents."""
    ids, gradient = torch.tensor([3, 5]), torch.full((2, 4), 0.5)
    state: dict[str, Any] = {
        "embedding": torch.zeros(2, 4),
        "exp_avg": torch.zeros(2, 4),
        "exp_avg_sq": torch.zeros(2, 4),
    }
    for step in range(1, steps + 1):
        adam_step(state, gradient, step)
    slots = {"id": ids, "embedding": state["embedding"]}
    slots |= {f"sparse_adamw_tf_{name}": state[name] for name in ("exp_avg", "exp_avg_sq")}
    blocks = {f"user.{slot}/part_0_1": tensor for slot, tensor in slots.items()}
    return (
        write(tmp_path / "recis", [blocks | {f"{name}^ ": tensor for name, tensor in counters.items()}]),
        state,
        gradient,
    )


def adam_step(state: dict[str, Any], gradient: Tensor, step: int) -> None:
    """Do a step of Adam (Kingma and Ba, end of section 2) in float64."""
    for name in state:
        state[name] = state[name].double()
    state["exp_avg"] = 0.9 * state["exp_avg"] + 0.1 * gradient
    state["exp_avg_sq"] = 0.999 * state["exp_avg_sq"] + 0.001 * gradient**2
    rate = 0.01 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
    state["embedding"] = state["embedding"] - rate * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)
    for name in state:
        state[name] = state[name].float()


@pytest.mark.parametrize("way", ["saved", "given", "some"])
def test_adam_continues_from_the_step_of_its_moments(tmp_path: Path, way: str) -> None:
    saved = {"sparse_adamw_tf_step": torch.tensor([7]), "sparse_adamw_tf_beta1": torch.tensor(0.9**7)}
    source, state, gradient = recis_adam(tmp_path, 7, **({} if way == "given" else saved))
    if way == "given":
        with pytest.warns(UserWarning, match=r"the tables \['user'\] have moments of Adam, but their number of steps"):
            import_recis(source, tmp_path / "without")
    import_recis(source, tmp_path / "run", adam_step=7 if way == "given" else None)
    name = "member" if way == "some" else "user"
    engine = EmbeddingEngine({name: EmbeddingConfig(dim=4)}, optimizer=optim.Adam)
    optimizer = optim.Adam(engine.parameters(), lr=0.01)
    if way == "some":
        Saver(tmp_path / "run").load_some({"engine": engine}, rename={"user": "member"})
    else:
        Saver(tmp_path / "run").load({"engine": engine})
    assert engine.tables[0].step == 7
    # Rows count as seen at import, so that the first eviction keeps them.
    assert engine.evict(Unused(1)) == 0
    for step in range(8, 11):
        adam_step(state, gradient, step)
        (engine({name: torch.tensor([3, 5])})[name] * gradient).sum().backward()
        optimizer.step()
    assert_near(engine.tables[0].export(0)["embedding"], state["embedding"], OF_ADAM)
    assert optimizer.checkpoint_state().meta["tables"][name]["step"] == 10  # type: ignore[index,call-overload]


def test_step_counters_are_not_towers(tmp_path: Path) -> None:
    source, _, _ = recis_adam(tmp_path, 3, sparse_adamw_tf_step=torch.tensor([3]), head=torch.ones(2))
    directory = import_recis(source, tmp_path / "run")
    model = json.loads((directory / "manifest.json").read_text())["parts"]["model"]
    assert list(model["tensors"]) == ["head"]
    for step in (torch.tensor([-1]), torch.tensor([1.5]), torch.tensor([1, 2])):
        source, _, _ = recis_adam(tmp_path, 3, sparse_adam_step=step)
        with pytest.raises(CorruptCheckpoint, match="'sparse_adam_step' must be one integer"):
            import_recis(source, tmp_path / "other")
    with pytest.raises(CheckpointError, match="adam_step must be an integer from 0"):
        import_recis(source, tmp_path / "other", adam_step=-1)


def test_hashed_ids_are_found_after_a_modulus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"user {number}" for number in range(200)]
    strings = RaggedTensor.from_strings(words)
    hashed = FeatureEngine([Feature("user", ops=[Hash("murmur")])])({"user": strings})["user"]
    assert isinstance(hashed, Tensor)
    assert int(hashed.min()) < 0
    cut = torch.tensor([number & (2**52 - 1) for number in hashed.tolist()])
    blocks = {"user.id/part_0_1": cut, "user.embedding/part_0_1": torch.arange(800.0).view(200, 4)}
    source = write(tmp_path / "recis", [blocks])
    assert main(["import-recis", str(source), str(tmp_path / "run"), "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert "the ids of the tables ['user'] fit in 52 bits" in note
    assert "put Mod(2**52) last, after the hash" in note
    features = FeatureEngine([Feature("user", ops=[Hash("murmur"), Mod(2**52)])])
    engine = EmbeddingEngine({"user": EmbeddingConfig(dim=4)}).eval()
    Saver(tmp_path / "run").load({"engine": engine})
    assert torch.equal(engine(features({"user": strings}))["user"], torch.arange(800.0).view(200, 4))


def test_unknown_slots_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"slots: no table has \['beta'\], the tables have \['embedding', 'id'"):
        import_recis(source, tmp_path / "run", slots={"beta": "sum"})
    assert main(["import-recis", str(source), str(tmp_path / "run"), "--slot", "beta=sum"]) == 1
    with pytest.warns(UserWarning, match=r"slots \['step'\] are skipped"):
        import_recis(source, tmp_path / "run", adam_step=3)


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
def test_invalid_blocks_are_refused(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    t = tables()
    blocks = {"t.id/part_0_1": t["ids"], "t.embedding/part_0_1": t["embedding"], **change}
    source = write(tmp_path / "recis", [{name: tensor for name, tensor in blocks.items() if tensor is not None}])
    with pytest.raises(CheckpointError, match=message):
        import_recis(source, tmp_path / "run")
    assert Saver(tmp_path / "run").steps() == []


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "must be JSON whose file_index"),
        ("[]", "must be JSON whose file_index"),
        ('{"file_index": {"../x": 0}, "block_index": {}}', "leads to '../x'"),
        ('{"file_index": {"absent": 0}, "block_index": {}}', "absent is missing"),
        ('{"file_index": {}, "block_index": {"a": 1}}', "must be JSON whose file_index"),
        ('{"file_index": {"index": 0}, "block_index": {"a": 0}}', "must be a safetensors file"),
    ],
)
def test_invalid_indexes_are_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "index").write_text(index)
    with pytest.raises(CorruptCheckpoint, match=message):
        import_recis(tmp_path, tmp_path / "run")


def test_other_folders_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-recis", str(tmp_path / "none"), str(tmp_path / "run")]) == 1
    assert "holds no file 'index'" in capsys.readouterr().err
    (source / "model-000001-of-000004.safetensors").write_bytes(b"12345678")
    assert main(["import-recis", str(source), str(tmp_path / "run")]) == 1
    assert "model-000001-of-000004.safetensors" in capsys.readouterr().err
