from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid.ops import program
from tests.support.devices import on_devices


def code(*rows: tuple[str, int, int, int, tuple[int, ...]]) -> torch.Tensor:
    return torch.tensor(
        [
            [program.STEPS.index(step), out, a, b, *numbers, *[0] * (4 - len(numbers))]
            for step, out, a, b, numbers in rows
        ]
    )


def test_instruction_numbers_match_native_code(root: Path) -> None:
    text = (root / "csrc/core/program.h").read_text()
    listed = re.search(r"enum class Step : int64_t \{(.*?)\};", text, re.DOTALL)
    assert listed is not None
    native = re.findall(r"k(\w+)", listed[1])
    assert [name.lower() for name in native] == [step.replace("_", "") for step in program.STEPS]
    tiles = re.search(r"kScratchTiles = (\d+)", text)
    assert tiles is not None
    assert int(tiles[1]) == program.SCRATCH_TILES


@given(st.integers(1, 2**63 - 1), st.integers(0, 2**64 - 1))
def test_divisor_words_divide(n: int, x: int) -> None:
    divisor, magic, shifts = program.divisor_words(n)
    high = (magic % 2**64 * x) >> 64
    quotient = (high + ((x - high) >> (shifts & 255))) >> (shifts >> 8)
    assert x - quotient * divisor == x % n


@on_devices
def test_a_program_of_two_columns(device: str) -> None:
    ids = torch.arange(1000, device=device) - 500
    prices = torch.linspace(0, 1, 77, device=device)
    bounds = torch.tensor([0.25, 0.5], device=device).view(torch.int64)
    steps = code(
        ("mod", 0, -1, -1, program.divisor_words(7)),
        ("clip_i64", -3, 0, 0, (2, 4)),
        ("bucket_f32", -4, -2, -2, (0, 2, 1)),
    )
    arguments = (
        [ids, prices],
        steps.to(device),
        bounds,
        [0, 2, 0, 0, -1, 2, 3, 1, 0, -1],
        [0, 1],
        [4, 4],
        "\n".join(program.refusal(label, "mod") for label in "abc"),
    )
    clipped, buckets, *_ = program.run(*arguments)
    assert clipped.tolist() == [min(max(i % 2**64 % 7, 2), 4) for i in range(-500, 500)]
    assert torch.equal(buckets, torch.bucketize(prices, torch.tensor([0.25, 0.5], device=device), right=True))
    torch.library.opcheck(torch.ops.recis.feature_program.default, (*arguments, True))


def test_a_refused_element_names_its_instruction() -> None:
    steps = code(("mod", -2, -1, -1, program.divisor_words(7)), ("hash_string", -5, -3, -4, (0,)))
    bad = torch.tensor([0, 9, 2])
    inputs = [torch.arange(3), torch.zeros(2, dtype=torch.uint8), bad]
    steps[0, 1], steps[1, 1:4] = -4, torch.tensor([-5, -2, -3])
    with pytest.raises(RuntimeError, match=r"the \{\} strings: element [01] has offsets"):
        program.run(
            inputs,
            steps,
            torch.zeros(1).long(),
            [0, 1, 0, 0, -1, 1, 2, 2, 1, -1],
            [0, -3],
            [4, 4],
            "\n".join([program.refusal("the ids", "mod"), program.refusal("the {} strings", "hash_string")]),
        )


@pytest.mark.parametrize("width", [1, 3])
def test_unused_values_are_not_refused(width: int) -> None:
    rows = torch.zeros(700, width)
    offsets = torch.tensor([0, 200, 600])
    steps = code(("bucket_f32", -3, -1, -1, (0, 1, 1)))
    bounds = torch.tensor([0.25, 0.5]).view(torch.int64)

    def run() -> None:
        program.run(
            [rows, offsets], steps, bounds, [0, 1, 0, 0, 1], [0], [4], program.refusal("the prices", "bucket_f32")
        )

    rows[600:] = torch.nan
    run()
    rows[599, width - 1] = torch.nan
    with pytest.raises(RuntimeError, match=f"the prices: element {600 * width - 1} is NaN"):
        run()


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_vocabulary_slots_hold_every_entry_once(count: int) -> None:
    hashes = torch.full((count,), 3)
    slots = program.vocabulary_slots(hashes)
    assert slots.numel() >= 2 * count
    assert sorted(slots[slots > 0].tolist()) == list(range(1, count + 1))
    torch.library.opcheck(torch.ops.recis.vocabulary_slots.default, (hashes, slots.numel()))
    with pytest.raises(RuntimeError, match="a power of two above the number of entries"):
        torch.ops.recis.vocabulary_slots(hashes, count)
