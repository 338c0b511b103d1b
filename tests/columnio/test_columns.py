from __future__ import annotations

from typing import Any

import pytest

from recis_hybrid.columnio import Dense, Ragged, Text


@pytest.mark.parametrize("spec", [Dense, Ragged])
def test_a_default_must_be_a_number(spec: Any) -> None:
    with pytest.raises(TypeError, match=f"{spec.__name__}: default must be a number, got 'x'"):
        spec(default="x")


def test_a_length_must_be_positive() -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0; omit it"):
        Dense(length=0)


def test_a_text_default_must_be_a_string() -> None:
    wrong: Any = 0
    with pytest.raises(TypeError, match="Text: default must be str or bytes, got 0"):
        Text(default=wrong)
