import pytest
import torch

from recis_hybrid.embedding import RecordLayout, StateField


@pytest.mark.parametrize(("dim", "offset", "size"), [(1, 16, 48), (4, 16, 48), (5, 32, 96), (64, 256, 768)])
def test_every_part_is_padded_to_16_bytes(dim: int, offset: int, size: int) -> None:
    layout = RecordLayout(dim, (StateField("exp_avg"), StateField("exp_avg_sq")))
    assert layout.parts == ("embedding", "exp_avg", "exp_avg_sq")
    assert [layout.offset(part) for part in layout.parts] == [0, offset, 2 * offset]
    assert layout.record_bytes == size


def test_state_may_have_a_width_of_its_own() -> None:
    layout = RecordLayout(8, (StateField("sum", width=1),))
    assert (layout.width("sum"), layout.record_bytes) == (1, 48)


def test_bad_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="dim must be positive"):
        RecordLayout(0)
    with pytest.raises(ValueError, match="must be torch.float32, got torch.float64"):
        RecordLayout(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be distinct and none 'embedding'"):
        RecordLayout(4, (StateField("sum"), StateField("sum")))
    with pytest.raises(KeyError, match="no optimizer state 'sum'; it has \\[\\]"):
        RecordLayout(4).offset("sum")
