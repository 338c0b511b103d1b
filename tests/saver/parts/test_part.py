from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from recis_hybrid.saver import CheckpointError, CheckpointMismatch, PartState, Saveable, Saver, TableState
from tests.saver.fakes import Shelf, edit_manifest, empty_shelf, example_shelf
from tests.support.devices import on_devices


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())


class Odd(nn.Module):
    """Tied, transposed, scalar, low-precision and integer entries, and extra state."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.second = self.first
        self.turned = nn.Parameter(torch.randn(3, 4, generator=generator).t())
        self.scale = nn.Parameter(torch.tensor(float(seed)))
        self.low = nn.Parameter(torch.randn(5, generator=generator).bfloat16())
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("mask", torch.arange(3) % 2 == seed % 2)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.note: dict[str, Any] = {"seed": seed}

    def get_extra_state(self) -> dict[str, Any]:
        return self.note

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.note = state


@on_devices
@pytest.mark.parametrize("background", [False, True])
def test_a_module_is_restored_bit_for_bit(tmp_path: Path, device: str, background: bool) -> None:
    saved, live = Odd(1).to(device), Odd(2).to(device)
    with torch.no_grad():
        saved.first.view(torch.int32)[0, 0] = 0x7FC00123  # a NaN with a payload
        saved.first[0, 1] = -0.0
        saved.first[0, 2] = math.inf
    saver = Saver(tmp_path, async_save=background)
    directory = saver.save(1, {"model": saved})
    saver.wait()
    parameters = {name: (p, p.data_ptr()) for name, p in live.named_parameters()}
    assert Saver(tmp_path).load({"model": live}) == 1
    for name, value in saved.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert bits(live.state_dict()[name]) == bits(value), name
    assert live.note == {"seed": 1}
    assert live.first is live.second or device != "cpu"
    assert {name: (p, p.data_ptr()) for name, p in live.named_parameters()} == parameters  # copied in place
    names = {"first", "second", "turned", "scale", "low", "count", "mask"}
    assert set(load_file(directory / "dense" / "model.safetensors")) == names


class OtherExtra(Odd):
    def get_extra_state(self) -> Any:
        return {1, 2}


def test_modules_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="part 'm', extra state of the module must be JSON"):
        Saver(tmp_path).save(1, {"m": OtherExtra(1)})
    with pytest.raises(
        CheckpointError, match=r"part 'm': parameters and buffers must be initialized, \['weight', 'bias'\]"
    ):
        Saver(tmp_path).save(1, {"m": nn.LazyLinear(3)})
    with pytest.raises(CheckpointError, match=r"part 'm': tensor 'weight' must be dense and have memory"):
        Saver(tmp_path).save(1, {"m": nn.Linear(2, 2, device="meta")})


def test_mismatched_modules_name_both_shapes(tmp_path: Path) -> None:
    Saver(tmp_path).save(1, {"model": nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))})
    live = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1, bias=False).double(), nn.BatchNorm1d(1))
    before = [bits(value) for value in live.state_dict().values()]
    with pytest.raises(CheckpointMismatch) as caught:
        Saver(tmp_path).load({"model": live})
    message = str(caught.value)
    for part in (
        f"{tmp_path}/step_000001/manifest.json: part 'model' does not fit the live object",
        "tensor '0.weight': checkpoint float32 [2, 3], live object float32 [2, 4]",
        "tensor '1.bias' is in the checkpoint only (float32 [1])",
        "tensor '1.weight': checkpoint float32 [1, 2], live object float64 [1, 2]",
        "tensor '2.running_mean' is in the live object only (float32 [1])",
        "Build the object as it was",
    ):
        assert part in message
    assert [bits(value) for value in live.state_dict().values()] == before


def test_a_saveable_receives_its_saved_state(tmp_path: Path) -> None:
    shelf, live = example_shelf(), empty_shelf()
    assert isinstance(shelf, Saveable)
    Saver(tmp_path).save(1, {"engine": shelf})
    Saver(tmp_path).load({"engine": live})
    assert live.loaded is not None
    table = live.loaded.tables["user/country"]
    assert table.columns["embedding"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert table.buckets.tolist() == [0, 7, 7, 65535, 65535]
    assert live.loaded.tensors["counts"].tolist() == [3, 1]
    assert live.loaded.meta == {"seed": 1}
    for tensor in (*table.columns.values(), table.buckets, *live.loaded.tensors.values()):
        assert tensor.data_ptr() % 64 == 0
    # New memory: changing it does not change the files.
    table.columns["embedding"].zero_()
    Saver(tmp_path).load({"engine": live})
    assert live.loaded.tables["user/country"].columns["embedding"][4, 1] == 40


def table(meta: dict[str, Any] | None = None, ids_only: bool = False, **columns: torch.Tensor) -> TableState:
    rows = {"ids": torch.zeros(0, dtype=torch.int64)}
    if not ids_only:
        rows |= {"embedding": torch.zeros(0, 2), "exp_avg": torch.zeros(0, 1, dtype=torch.bfloat16)}
    return TableState(rows | columns, torch.zeros(0, dtype=torch.int64), meta or {"dim": 2, "dtype": "float32"})


COUNTS = {"counts": torch.zeros(2, dtype=torch.int32)}


@pytest.mark.parametrize(
    ("live", "messages"),
    [
        (
            PartState({"item": table()}, COUNTS),
            ["table 'user/country' is in the checkpoint only (ids", "table 'item' is in the live object only (ids"],
        ),
        (
            PartState({"user/country": table(embedding=torch.zeros(0, 3))}, COUNTS),
            ["table 'user/country', column 'embedding': checkpoint float32 [2], live object float32 [3]"],
        ),
        (
            PartState({"user/country": table(embedding=torch.zeros(0, 2).half())}, COUNTS),
            ["table 'user/country', column 'embedding': checkpoint float32 [2], live object float16 [2]"],
        ),
        (
            PartState({"user/country": table(ids_only=True, sum=torch.zeros(0, 1))}, COUNTS),
            ["column 'exp_avg' is in the checkpoint only", "column 'sum' is in the live object only"],
        ),
        (
            PartState({"user/country": table({"dim": 2, "dtype": "bfloat16"})}, COUNTS),
            ["table 'user/country', meta 'dtype': checkpoint \"float32\", live object \"bfloat16\""],
        ),
        (
            PartState({"user/country": table({"dim": 2.0, "dtype": "float32"})}, COUNTS),
            ["table 'user/country', meta 'dim': checkpoint 2, live object 2.0"],
        ),
        (
            PartState({"user/country": table()}, {"counts": torch.zeros(3, dtype=torch.int32)}),
            ["tensor 'counts': checkpoint int32 [2], live object int32 [3]"],
        ),
        (
            PartState({"user/country": table()}, {}),
            ["tensor 'counts' is in the checkpoint only (int32 [2])"],
        ),
        (
            PartState({f"t{i}": table() for i in range(20)}, COUNTS),
            ["; and 13 more. Nothing was loaded."],
        ),
    ],
)
def test_tables_of_another_model_are_named(tmp_path: Path, live: PartState, messages: list[str]) -> None:
    Saver(tmp_path).save(1, {"engine": example_shelf()})
    shelf = Shelf(live)
    with pytest.raises(CheckpointMismatch) as caught:
        Saver(tmp_path).load({"engine": shelf})
    for message in messages:
        assert message in str(caught.value)
    assert shelf.loaded is None


def test_one_mismatched_part_stops_all(tmp_path: Path) -> None:
    Saver(tmp_path).save(1, {"a": example_shelf(), "b": nn.Linear(2, 2), "c": example_shelf()})
    first, second, third = empty_shelf(), nn.Linear(3, 2), empty_shelf()
    before = bits(second.weight)
    with pytest.raises(CheckpointMismatch, match="part 'b'"):
        Saver(tmp_path).load({"a": first, "b": second, "c": third})
    assert first.loaded is None
    assert third.loaded is None
    assert bits(second.weight) == before


class Both(nn.Linear):
    """A module that implements Saveable."""

    def checkpoint_state(self) -> PartState:
        return PartState(tensors={"w": self.weight.detach()})

    def load_checkpoint_state(self, state: PartState) -> None:
        with torch.no_grad():
            self.weight.copy_(state.tensors["w"])


def test_a_saveable_module_is_treated_as_a_saveable(tmp_path: Path) -> None:
    saved, live = Both(2, 2), Both(2, 2)
    directory = Saver(tmp_path).save(1, {"both": saved})
    assert set(load_file(directory / "dense" / "both.safetensors")) == {"w"}
    Saver(tmp_path).load({"both": live})
    assert bits(live.weight) == bits(saved.weight)


@pytest.mark.parametrize("value", [torch.zeros(2), object(), nn.Linear, Shelf, (1, 2), b"bytes"])
def test_other_values_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"part 'it' must be a Saveable .* got \w+"):
        Saver(tmp_path).save(1, {"it": value})
    assert not list(tmp_path.iterdir())


def test_another_kind_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    Saver(tmp_path).save(1, {"model": model, "note": 3})
    with pytest.raises(CheckpointMismatch, match=r"part 'model' was saved from a module, but a saveable was requested"):
        Saver(tmp_path).load({"model": example_shelf()})
    with pytest.raises(CheckpointMismatch, match=r"part 'note' was saved from a json, .* Use Saver.read_json"):
        Saver(tmp_path).load({"note": model})
    with pytest.raises(CheckpointMismatch, match="part 'model' was saved from a module, but a json was requested"):
        Saver(tmp_path).read_json("model")
    with pytest.raises(CheckpointError, match=r"part 'note' is JSON, .* Use Saver.read_json"):
        Saver(tmp_path).load({"note": 4})


def test_extra_state_must_be_an_object(tmp_path: Path) -> None:
    directory = Saver(tmp_path).save(1, {"model": nn.Linear(2, 2)})
    edit_manifest(directory, lambda d: d["parts"]["model"]["meta"].update(extra=[1]))
    with pytest.raises(CheckpointError, match=r"meta.extra must be an object, got \[1\]"):
        Saver(tmp_path).load({"model": nn.Linear(2, 2)})


@pytest.fixture
def alone() -> Iterator[None]:
    """Set up a process group with this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_names_do_not_depend_on_distributed_data_parallel(tmp_path: Path, alone: None) -> None:
    plain = nn.ModuleDict({"tower": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), "bias": nn.Linear(1, 1)})
    wrapped = nn.ModuleDict({"tower": DistributedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))})
    wrapped["bias"] = nn.Linear(1, 1)
    whole = DistributedDataParallel(
        nn.ModuleDict({"tower": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), "bias": nn.Linear(1, 1)})
    )
    saver = Saver(tmp_path)
    saver.save(1, {"model": wrapped})
    for other in (plain, whole):
        saver.load({"model": other})
    for own, (name, value) in zip(wrapped.state_dict().values(), plain.state_dict().items(), strict=True):
        assert torch.equal(own, value), name
        assert torch.equal(whole.state_dict()[f"module.{name}"], value), name
    assert saver.load_some({"model": whole}, only="tower.*").loaded == [
        "model: tower.0.bias",
        "model: tower.0.weight",
        "model: tower.1.bias",
        "model: tower.1.weight",
    ]


def test_the_kind_of_a_saveable_must_be_known(tmp_path: Path) -> None:
    shelf = example_shelf()
    shelf.checkpoint_kind = "shelf"  # type: ignore[attr-defined]
    with pytest.raises(
        CheckpointError, match="part 'shelf': checkpoint_kind must be one of .*'optimizer'.*, got 'shelf'"
    ):
        Saver(tmp_path).save(1, {"shelf": shelf})


def towers(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({"tower": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "bias": nn.Linear(1, 1)})


def wrapped_in(how: str, model: nn.ModuleDict) -> nn.Module:
    """Wrap the model (upper case) or its tower (lower case), innermost wrapper first."""
    for letter in how:
        wrap = {"c": lambda each: torch.compile(each, backend="eager"), "d": DistributedDataParallel}[letter.lower()]
        if letter.isupper():
            return wrap(model)
        model["tower"] = wrap(model["tower"])
    return model


WRAPPINGS = ["", "c", "d", "cd", "dc", "C", "D", "cD", "dcC"]


@pytest.mark.parametrize("first", WRAPPINGS)
def test_names_do_not_depend_on_wrappers(tmp_path: Path, alone: None, first: str) -> None:
    saver = Saver(tmp_path)
    model = towers(1)
    whole = wrapped_in(first, model)
    dense = torch.optim.Adam(whole.parameters(), lr=0.1)
    sum(parameter.square().sum() for parameter in whole.parameters()).backward()
    dense.step()
    saver.save(1, {"model": whole, "dense": dense})
    named = list(towers(1).state_dict())
    assert sorted(
        json.loads((tmp_path / "step_000001" / "manifest.json").read_text())["parts"]["model"]["tensors"]
    ) == (sorted(named))
    for second in WRAPPINGS:
        inner = towers(2)
        other = wrapped_in(second, inner)
        again = torch.optim.Adam(other.parameters(), lr=0.5)
        saver.load({"model": other, "dense": again})
        for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert again.param_groups[0]["lr"] == 0.1
        assert [each["step"] for each in again.state_dict()["state"].values()] == [1] * 6
        assert saver.load_some({"model": other}, only="tower.*").loaded == [
            f"model: {name}" for name in sorted(named) if name.startswith("tower.")
        ]
