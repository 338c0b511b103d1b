"""Each way of losing a rank, once; ``make faults`` runs each twenty times."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.embedding.faults import FAULTS, lose


@pytest.mark.slow
@pytest.mark.parametrize("how", FAULTS)
def test_the_other_ranks_raise_an_error(how: str, tmp_path: Path) -> None:
    lose(random.Random(f"ci.{how}"), how, str(tmp_path))
