from __future__ import annotations

import pytest
import torch

from recis_hybrid.embedding import RecordLayout, StateField

MOMENTS = (StateField("exp_avg"), StateField("exp_avg_sq"))


@pytest.mark.parametrize(
    ("dim", "meta", "first", "second", "size"),
    [(1, 16, 32, 48, 64), (4, 16, 32, 48, 64), (5, 32, 48, 80, 112), (64, 256, 272, 528, 832)],
)
def test_every_part_is_padded_to_16_bytes(dim: int, meta: int, first: int, second: int, size: int) -> None:
    layout = RecordLayout(dim, MOMENTS)
    assert layout.parts == ("embedding", "exp_avg", "exp_avg_sq")
    assert [layout.offset(part) for part in layout.parts] == [0, first, second]
    assert (layout.meta_offset, layout.record_bytes) == (meta, size)


def test_narrow_types_take_half_the_space() -> None:
    layout = RecordLayout(
        20, (*MOMENTS, StateField("sum", width=1, dtype=torch.float32)), torch.bfloat16, torch.bfloat16
    )
    assert [layout.offset(part) for part in layout.parts] == [0, 64, 112, 160]
    assert layout.record_bytes == 176
    assert RecordLayout(20, MOMENTS, torch.float16).record_bytes == 48 + 16 + 80 + 80


def test_first_values_in_memory() -> None:
    layout = RecordLayout(
        4,
        (StateField("a", first_value=1.0), StateField("b", width=1, first_value=-2.0)),
        torch.bfloat16,
        torch.bfloat16,
    )
    args = layout.state_args
    assert (args.offsets, args.widths, args.sizes) == ([32, 48], [4, 1], [2, 2])
    assert args.first_values == [0x3F80, 0xC000]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"dim": 4, "dtype": torch.float64}, "dtype must be one of .*got torch.float64"),
        ({"dim": 4, "state_dtype": torch.bfloat16}, "state_dtype must be torch.float32 or the embedding's"),
        ({"dim": 4, "state": (StateField("x"), StateField("x"))}, "state names must be distinct"),
        ({"dim": 4, "state": (StateField("embedding"),)}, "state names must be distinct and not 'embedding'"),
    ],
)
def test_bad_layouts_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecordLayout(**settings)


def test_the_name_of_an_unknown_optimizer_state_is_reported() -> None:
    with pytest.raises(KeyError, match=r"no optimizer state 'sum'; it has \['exp_avg'\]"):
        RecordLayout(4, (StateField("exp_avg"),)).offset("sum")
