from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recis_hybrid.columnio import ColumnDataset

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("transformers")
posters = pytest.importorskip("examples.posters")


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return file.getvalue()


def test_images_of_a_column_become_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    gray = np.full((7, 5), 255, np.uint8)
    column = [encoded(pixels, "PNG"), encoded(gray, "JPEG"), encoded(pixels, "PNG")]
    dataset = ColumnDataset.from_arrow(
        {"poster": pa.array(column)}, ["poster"], 3, transforms=lambda batch: posters.decode_posters(batch, 4)
    )
    found = next(iter(dataset))["poster"]
    assert found.dtype == torch.float32
    expected = torch.from_numpy(pixels).permute(2, 0, 1).double() / 127.5 - 1
    for row in (0, 2):
        torch.testing.assert_close(found[row].double(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], torch.ones(3, 4, 4))


def test_bytes_that_are_no_image_are_refused() -> None:
    with pytest.raises(ValueError, match=r"poster: b'GIF89a\?\?'\.\.\. is not an image that Pillow can read"):
        posters.decode(b"GIF89a?? and so on", 4)


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.jax)])
def test_posters_help_on_new_films(
    framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pq.write_table(posters.draw_posters(8000), tmp_path / "clicks.parquet")
    arguments = ["--data", str(tmp_path / "clicks.parquet"), "--framework", framework, "--epochs", "4"]
    monkeypatch.setattr(sys, "argv", ["posters.py", *arguments])
    posters.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["auc"]
    assert found["posters"] > found["ids"] + 0.02
