"""Frozen parameters that came from files are left out of checkpoints and read from the files again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid.checkpointing import WeightFiles
from recis_hybrid.saver import CheckpointMismatch, CorruptCheckpoint, Saver
from recis_hybrid.saver.cli import main
from tests.saver.fakes import edit_manifest


class Files:
    """One safetensors file; its tensors are read in the dtype of the module."""

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.path, self.dtype = path, dtype

    @property
    def source(self) -> str:
        return str(self.path)

    def digest(self) -> str:
        return sha256(self.path.read_bytes()).hexdigest()

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        tensors = load_file(self.path)
        yield from ((name, tensors[name].to(self.dtype)) for name in names if name in tensors)


class Pretrained(nn.Module):
    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.to(dtype).load_state_dict(load_file(path), strict=False)
        self.requires_grad_(False)
        self.weight_files: WeightFiles | None = Files(path, dtype)


class Model(nn.Module):
    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.tower, self.head = Pretrained(path, dtype), nn.Linear(3, 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "weights.safetensors"
    save_file({f"body.{name}": torch.randn_like(value) for name, value in nn.Linear(3, 3).named_parameters()}, file)
    return file


def saved_names(directory: Any) -> set[str]:
    return set(json.loads((directory / "manifest.json").read_text())["parts"]["model"]["tensors"])


HEAD = {"head.weight", "head.bias"}
NORM = {f"tower.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
BODY = {"tower.body.weight", "tower.body.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("background", [False, True])
def test_frozen_parameters_are_read_from_their_files(
    tmp_path: Path, path: Path, dtype: torch.dtype, background: bool
) -> None:
    model, other = Model(path, dtype), Model(path, dtype)
    saver = Saver(tmp_path / "run", async_save=background)
    directory = saver.save(1, {"model": model})
    saver.wait()
    assert saved_names(directory) == HEAD | NORM  # the file has no norm
    with torch.no_grad():
        other.tower.body.weight.add_(1)
    saver.load({"model": other})
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    if dtype is torch.bfloat16:
        with pytest.raises(
            CheckpointMismatch, match=r"tower.body.bias': checkpoint bfloat16 \[3\], live object float32"
        ):
            saver.load({"model": Model(path)})


def test_whatever_differs_from_the_files_is_saved(tmp_path: Path, path: Path) -> None:
    model, saver = Model(path), Saver(tmp_path / "run")
    model.tower.body.bias.requires_grad_(True)
    with torch.no_grad():
        model.tower.body.weight[0, 0] += 1
    assert saved_names(saver.save(1, {"model": model})) == HEAD | NORM | BODY
    model.tower.body.weight.data = load_file(path)["body.weight"]
    assert saved_names(saver.save(2, {"model": model})) == HEAD | NORM | {"tower.body.bias"}
    model.tower.weight_files = None
    assert saved_names(saver.save(3, {"model": model})) == HEAD | NORM | BODY
    model.tower.weight_files = Files(path)
    path.rename(tmp_path / "elsewhere")
    assert saved_names(saver.save(4, {"model": model})) == HEAD | NORM | BODY
    (tmp_path / "elsewhere").rename(path)
    whole = Saver(tmp_path / "whole", save_frozen=True)
    assert saved_names(whole.save(1, {"model": model})) == HEAD | NORM | BODY


def test_missing_and_changed_files_are_refused_by_name(tmp_path: Path, path: Path) -> None:
    model, saver = Model(path), Saver(tmp_path / "run")
    saver.save(1, {"model": model})
    with torch.no_grad():
        model.head.weight.zero_()
    plain = Model(path)
    plain.tower.weight_files = None
    with pytest.raises(
        CheckpointMismatch, match=r"weights.safetensors .*, and the live object was not read from files"
    ):
        saver.load({"model": plain})
    bytes_before = path.read_bytes()
    save_file({**load_file(path), "body.bias": torch.ones(3)}, path)
    with pytest.raises(
        CheckpointMismatch, match=r"weights.safetensors \(digest .*but .*weights.safetensors has the dig"
    ):
        saver.load({"model": model})
    path.unlink()
    with pytest.raises(CheckpointMismatch, match=r"weights.safetensors cannot be read"):
        saver.load({"model": model})
    assert not model.head.weight.any()  # nothing was loaded
    path.write_bytes(bytes_before)
    saver.load({"model": model})
    assert model.head.weight.any()


def test_wrapped_towers_and_towers_in_other_places_are_found(tmp_path: Path, path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Pretrained(path)

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = Model(path)
        saver = Saver(tmp_path / "run")
        model.head = DistributedDataParallel(model.head)  # type: ignore[assignment]
        assert saved_names(saver.save(1, {"model": DistributedDataParallel(model)})) == HEAD | NORM
    finally:
        torch.distributed.destroy_process_group()
    saver.load({"model": Model(path)})
    two = Two()
    two.encoder.body.weight.data.zero_()
    loaded = saver.load_some({"model": two}, rename={"tower.*": "encoder.*"}, only="encoder.*")
    assert "model: encoder.body.weight" in loaded.loaded
    assert torch.equal(two.encoder.body.weight, model.tower.body.weight)
    two.encoder.weight_files = None
    some = saver.load_some({"model": two}, rename={"tower.*": "encoder.*"}, only="encoder.*", strict=False)
    assert some.missing == ["model: encoder.body.weight", "model: encoder.body.bias"]
    with pytest.raises(CheckpointMismatch, match="was not read from files"):
        saver.load_some({"model": two}, rename={"tower.*": "encoder.*"}, only="encoder.*")
    saver.load_some({"model": two}, rename={"tower.*": "encoder.*"}, only="encoder.norm.*")


def test_tools_name_what_is_left_out(tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Saver(tmp_path / "run").save(1, {"model": Model(path)})
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert f"2 frozen tensors left out: {path}, digest {Files(path).digest()}" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert f"part 'model' lacks 2 frozen tensors, which are in {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "files", [3, [3], [{"module": "tower"}], [{"module": "", "source": "", "digest": "", "tensors": 1}]]
)
def test_malformed_descriptions_are_refused(tmp_path: Path, path: Path, files: Any) -> None:
    model, saver = Model(path), Saver(tmp_path / "run")
    directory = saver.save(1, {"model": model})
    edit_manifest(directory, lambda document: document["parts"]["model"]["meta"].update(files=files))
    with pytest.raises(CorruptCheckpoint, match=r"meta.files must"):
        saver.load({"model": model})
