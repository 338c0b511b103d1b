"""Partial loads: selected tables and towers, other names and models, and files of the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import save_file
from torch import nn

from recis_hybrid import optim
from recis_hybrid.embedding import EmbeddingConfig, EmbeddingEngine, MinFrequency, Unused
from recis_hybrid.saver import CheckpointError, CheckpointMismatch, CorruptCheckpoint, Saver, load_pretrained
from recis_hybrid.saver.actions.selection import Selection
from recis_hybrid.saver.cli import main
from tests.saver.fakes import Shelf, example_shelf


def engine_of(*names: str, dim: int = 3, seed: int = 0, optimizer: Any = optim.Adam, **more: Any) -> EmbeddingEngine:
    config = EmbeddingConfig(dim=dim, **more)
    return EmbeddingEngine(dict.fromkeys(names, config), optimizer=optimizer, seed=seed)


def train(engine: EmbeddingEngine, steps: int, ids: torch.Tensor | None = None) -> None:
    optimizer = optim.Adam(engine.parameters(), lr=0.1)
    ids = torch.arange(10) if ids is None else ids
    for _ in range(steps):
        sum(out.square().sum() for out in engine.train()(dict.fromkeys(engine.configs, ids)).values()).backward()
        optimizer.step()


def rows(engine: EmbeddingEngine, name: str) -> dict[str, torch.Tensor]:
    table, member = next((t, k) for t in engine.tables for k, m in enumerate(t.members) if m.name == name)
    return table.export(member)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *columns: str) -> bool:
    return all(torch.equal(a[c], b[c]) for c in columns or a)


def towers(*names: str, seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({name: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for name in names})


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, EmbeddingEngine, nn.ModuleDict]:
    """Return a run of twenty steps with three tables and two towers; the last save is incremental."""
    engine, model = engine_of("user", "item", "shop"), towers("ctr", "cvr")
    saver = Saver(tmp_path / "run")
    train(engine, 19)
    saver.save(1, {"engine": engine, "model": model}, delta=True)
    train(engine, 1, torch.arange(5, 15))
    saver.save(2, {"engine": engine, "model": model}, delta=True)
    return tmp_path / "run", engine, model


def test_one_table_and_one_tower(saved: tuple[Path, EmbeddingEngine, nn.ModuleDict]) -> None:
    root, engine, model = saved
    other, tower = engine_of("user", "item", "brand", seed=4), towers("ctr", "new", seed=4)
    train(other, 2)
    before, kept = rows(other, "item"), {name: value.clone() for name, value in tower.state_dict().items()}
    loaded = Saver(root).load_some({"engine": other, "model": tower}, only=["user", "ctr.*"])
    assert loaded.step == 2
    assert loaded.loaded == ["engine: user", *sorted(f"model: {name}" for name in kept if name.startswith("ctr."))]
    assert (loaded.missing, loaded.unused, loaded.unfit) == ([], [], [])
    mine, theirs = rows(other, "user"), rows(engine, "user")
    assert equal(mine, theirs, "ids", "embedding", "exp_avg", "exp_avg_sq", "frequency")
    # This run has done two steps, and loaded rows are not evicted later than its own.
    assert mine["seen_step"].tolist() == [2] * 15
    assert equal(rows(other, "item"), before)
    for name, value in tower.state_dict().items():
        assert torch.equal(value, model.state_dict()[name] if name.startswith("ctr.") else kept[name])
    train(other, 3, torch.arange(3))
    assert other.evict(Unused(3)) > 0


def test_only_required_files_are_read(saved: tuple[Path, EmbeddingEngine, nn.ModuleDict]) -> None:
    root = saved[0]
    for step in (1, 2):
        path = next((root / f"step_{step:06d}" / "sparse" / "engine" / "item").iterdir())
        path.write_bytes(bytes(path.stat().st_size))
    other = engine_of("user", "item", seed=4)
    Saver(root).load_some({"engine": other}, only="user")
    with pytest.raises(CorruptCheckpoint, match="table 'item'.*There|table 'item'.*Other steps"):
        Saver(root).load_some({"engine": other}, only="item")


def test_other_names(saved: tuple[Path, EmbeddingEngine, nn.ModuleDict]) -> None:
    root, engine, model = saved
    other, tower = engine_of("member", "shop_v2", seed=4), nn.ModuleDict({"deep": towers("main", seed=5)})
    rename = {"user": "member", "ctr.0.*": "deep.main.0.*", "ctr.*": "deep.main.*", "*": "*_v2"}
    loaded = Saver(root).load_some({"engine": other, "model": tower}, rename=rename, exclude=["item", "cvr.*"])
    assert [name for name in loaded.loaded if name.startswith("engine")] == ["engine: shop_v2", "engine: member"]
    assert equal(rows(other, "member"), rows(engine, "user"), "ids", "embedding", "exp_avg")
    assert equal(rows(other, "shop_v2"), rows(engine, "shop"), "ids", "embedding", "exp_avg")
    assert torch.equal(tower["deep"]["main"][0].weight, model["ctr"][0].weight)
    with pytest.raises(CheckpointError, match="'item' and 'user' both become 'member'"):
        Saver(root).load_some({"engine": other}, rename={"user": "member", "item": "member"}, only="member")
    with pytest.raises(CheckpointError, match="at most as many"):
        Saver(root).load_some({"engine": other}, rename={"user": "*"})


def test_strict_names_mismatches_and_changes_nothing(saved: tuple[Path, EmbeddingEngine, nn.ModuleDict]) -> None:
    root = saved[0]
    other, tower = engine_of("user", "brand", dim=2, seed=4), towers("ctr", "new", seed=4)
    train(other, 1)
    before = rows(other, "user")
    with pytest.raises(CheckpointMismatch) as caught:
        Saver(root).load_some({"engine": other, "model": tower})
    text = str(caught.value)
    for expected in (
        "engine: table user: column embedding: checkpoint float32 [3], live object float32 [2]",
        "engine: item is in the checkpoint only",
        "engine: brand is in the live object only",
        "and 5 more like these; engine: brand",
        "and 4 more like these. Nothing was loaded. Narrow the",
    ):
        assert expected in text
    assert equal(rows(other, "user"), before)
    loaded = Saver(root).load_some({"engine": other, "model": tower}, strict=False)
    assert loaded.unfit == ["engine: table user: column embedding: checkpoint float32 [3], live object float32 [2]"]
    assert loaded.unused[:2] == ["engine: item", "engine: shop"]
    assert loaded.missing[0] == "engine: brand"
    assert all("ctr" in name for name in loaded.loaded)
    assert equal(rows(other, "user"), before)


@pytest.mark.parametrize("exported", [False, True])
def test_warm_start_with_another_optimizer_and_dtype(
    saved: tuple[Path, EmbeddingEngine, nn.ModuleDict], exported: bool
) -> None:
    root, engine, _ = saved
    if exported:
        assert main(["export", str(root), str(root.parent / "out")]) == 0
        root = root.parent / "out"
    for dtype in (torch.float32, torch.bfloat16):
        other = engine_of("user", optimizer=optim.Adagrad, dtype=dtype, seed=4)
        with pytest.raises(CheckpointMismatch, match="checkpoint has the columns"):
            Saver(root).load_some({"engine": other}, only="user")
        loaded = Saver(root).load_some({"engine": other}, only="user", strict=False)
        assert loaded.loaded == ["engine: user"]
        mine, theirs = rows(other, "user"), rows(engine, "user")
        assert torch.equal(mine["embedding"], theirs["embedding"].to(dtype))
        assert mine["sum"].unique().numel() == 1  # the first value of new rows
        assert mine["frequency"].tolist() == ([0] * 15 if exported else theirs["frequency"].tolist())


def test_admission_counts_are_loaded_if_selected(tmp_path: Path) -> None:
    engine = engine_of("user", admission=MinFrequency(2))
    engine({"user": torch.tensor([1, 2, 2])})
    Saver(tmp_path).save(1, {"engine": engine})
    for only, known in (("user", 0), ("user*", 1)):
        other = engine_of("user", admission=MinFrequency(2), seed=4)
        Saver(tmp_path).load_some({"engine": other}, only=only)
        assert rows(other, "user")["ids"].tolist() == [2]
        gate = other.tables[0].store.gate
        assert gate is not None
        assert gate.state_dict(0)["ids"].numel() == known


def test_deltas_are_exact_after_a_partial_load(saved: tuple[Path, EmbeddingEngine, nn.ModuleDict]) -> None:
    root = saved[0]
    other, saver = engine_of("user", "item", seed=4), Saver(root.parent / "mine")
    train(other, 3, torch.arange(100, 120))
    saver.save(1, {"engine": other}, delta=True)
    Saver(root).load_some({"engine": other}, only="user")
    saver.save(2, {"engine": other}, delta=True)
    again = engine_of("user", "item", seed=5)
    saver.load({"engine": again})
    assert all(equal(rows(again, name), rows(other, name)) for name in ("user", "item"))


def test_parts_without_partial_loading_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    adam = torch.optim.Adam(model.parameters())
    Saver(tmp_path).save(1, {"shelf": example_shelf(), "adam": adam, "model": model})
    shelf = example_shelf()
    assert isinstance(shelf, Shelf)
    with pytest.raises(CheckpointError, match=r"part 'shelf' \(Shelf\) has no load_checkpoint_tables"):
        Saver(tmp_path).load_some({"shelf": shelf})
    with pytest.raises(CheckpointError, match="part 'adam': the parameters of the optimizer have no names, because th"):
        Saver(tmp_path).load_some({"adam": adam})
    generator = torch.Generator()
    Saver(tmp_path).save(2, {"generator": generator})
    with pytest.raises(CheckpointError, match="part 'generator' is of kind generator, which cannot be loaded partia"):
        Saver(tmp_path).load_some({"generator": generator})


@pytest.mark.parametrize(
    ("rename", "name", "live"),
    [
        ({"a": "b"}, "a", "b"),
        ({"a": "b"}, "aa", "aa"),
        ({"a.*": "b.*"}, "a.x.y", "b.x.y"),
        ({"*.a.*": "*-*"}, "x.a.y", "x-y"),
        ({"*.weight": "w.*"}, "enc.0.weight", "w.enc.0"),
        ({"a?": "b"}, "ax", "b"),
        ({"[ab]x*": "c*"}, "bx1", "c1"),
        ({"[!ab]x": "c"}, "ax", "ax"),
        ({"*": ""}, "gone", ""),
        ({"a*": "first", "*": "second"}, "ab", "first"),
        ({"a.b": "x"}, "aXb", "aXb"),
    ],
)
def test_rename(rename: dict[str, str], name: str, live: str) -> None:
    assert Selection(None, (), rename).live_name(name) == live


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_text_is_a_pattern(pattern: str, name: str) -> None:
    selection = Selection(pattern, (), {pattern: "x"})
    assert (selection.live_name(name) == "x") >= selection.takes(name) or name == "x"


UNMATCHED: list[tuple[dict[str, Any], str]] = [
    ({"only": ["usr"]}, r"only='usr' matches no name .*; similar names: 'user'"),
    ({"only": ["user", "itm*"]}, r"only='itm\*' matches no name .*; similar names: 'item'"),
    ({"only": "USER"}, "only='USER' matches no name .* similar names: 'user'"),
    ({"only": ""}, "only='' matches no name .*; there are 'item', 'shop', 'user', 'ctr.0.bias' and [0-9]+ more"),
    ({"only": []}, "only: must have at least one pattern, got none"),
    ({"exclude": ["shop", "usr"]}, r"exclude='usr' matches no name .*; similar names: 'user'"),
    ({"rename": {"usr": "member"}}, r"rename='usr' matches no name in the checkpoint; similar names: 'user'"),
    ({"rename": {"ctr.1.*": "x.*", "*": "*", "user": "member"}}, "rename='user' renames nothing"),
    ({"only": "user", "exclude": ["u*"]}, "select none of"),
    ({"only": 3}, "only: must be a pattern or a list of patterns"),
    ({"exclude": ["user", 3]}, "exclude: must be a pattern or a list of patterns"),
    ({"rename": ["user"]}, "rename: must map names to names"),
]


def test_patterns_that_select_nothing_are_refused(saved: tuple[Path, EmbeddingEngine, nn.ModuleDict]) -> None:
    other, tower = engine_of("user", "item", "shop", seed=4), towers("ctr", "cvr", seed=4)
    before = rows(other, "user")
    for number, (arguments, message) in enumerate(UNMATCHED):
        with pytest.raises(CheckpointError, match=message):
            Saver(saved[0]).load_some({"engine": other, "model": tower}, strict=number % 2 == 0, **arguments)
    assert equal(rows(other, "user"), before)
    # A name may belong to any part, in the checkpoint or in the live objects.
    loaded = Saver(saved[0]).load_some(
        {"engine": other, "model": tower},
        only=["user", "ctr.*", "member"],
        exclude=["ctr.1.*"],
        rename={"item": "member"},
        strict=False,
    )
    assert loaded.loaded == ["engine: user", "model: ctr.0.bias", "model: ctr.0.weight"]


def test_unmatched_patterns_of_pretrained_files_are_refused(tmp_path: Path) -> None:
    save_file(bert(), tmp_path / "model.safetensors")
    model = towers("enc", "pool", seed=8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for arguments, message in (
        ({"only": "encoder.*"}, r"only='encoder\.\*' matches no name"),
        ({"exclude": "cls.*"}, "exclude='cls"),
        ({"rename": {"brt.*": "*"}}, r"rename='brt\.\*' matches no name in the checkpoint; similar names: 'bert\.enc"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_pretrained(model, tmp_path, strict=False, **arguments)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Files of the Hugging Face Hub


def bert() -> dict[str, torch.Tensor]:
    return {f"bert.{name}": value for name, value in towers("enc", "pool", seed=7).state_dict().items()}


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor], parts: int) -> None:
    weight_map = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = dict(list(tensors.items())[part::parts])
        save_file(own, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["file", "folder", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pretrained(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    tensors = bert() | {"cls.bias": torch.zeros(9)}
    if form == "sharded":
        write_sharded(tmp_path, tensors, 3)
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors" if form == "file" else tmp_path
    model = towers("enc", "pool", seed=8).to(dtype)
    loaded = load_pretrained(model, path, rename={"bert.*": "*"}, exclude="cls.*")
    assert sorted(loaded.loaded) == sorted(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[f"bert.{name}"].to(value.dtype))
    model = towers("enc", "other", seed=8)
    with pytest.raises(CheckpointMismatch, match="other.0.weight is in the live object only"):
        load_pretrained(model, path, rename={"bert.*": "*"})
    loaded = load_pretrained(model, path, rename={"bert.*": "*"}, strict=False)
    assert "cls.bias" in loaded.unused
    assert "other.0.weight" in loaded.missing
    assert load_pretrained(model, path, rename={"bert.*": "*"}, only="enc.*").missing == []


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "weight_map must name the file"),
        (b"[]", "weight_map must name the file"),
        (b'{"weight_map": 3}', "weight_map must name the file"),
        (b'{"weight_map": {"a": "../model.safetensors"}}', "leads to '../model.safetensors'"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "leads to '/etc/passwd'"),
        (b'{"weight_map": {"a": 3}}', "weight_map must name the file"),
        (b'{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors is missing"),
        (b'{"weight_map": {"a": "here.safetensors"}}', r"must hold \['a'\], as the index says"),
    ],
)
def test_invalid_indexes_are_refused(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    save_file({"b": torch.zeros(1)}, tmp_path / "here.safetensors")
    with pytest.raises(CorruptCheckpoint, match=message):
        load_pretrained(nn.Linear(1, 1), tmp_path)


def test_invalid_pretrained_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a safetensors file, or a folder with"):
        load_pretrained(nn.Linear(1, 1), tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(CorruptCheckpoint, match="must be a safetensors file, but"):
        load_pretrained(nn.Linear(1, 1), tmp_path / "x.safetensors")
