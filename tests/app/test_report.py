from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from recis_hybrid.app.report import write_report
from recis_hybrid.app.svg import ticks
from recis_hybrid.metrics import AUC
from recis_hybrid.pipelines import Evaluate, JsonLog, Train, Trainer
from tests.support.small import make_batches, make_step


class Parser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.polylines: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "polyline":
            self.polylines.append(len((dict(attrs)["points"] or "").split()))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    batches = make_batches()
    trainer = Trainer(
        make_step(clip_grad_norm=1.0),
        batches,
        batches,
        metrics={"auc": AUC()},
        callbacks=[JsonLog(tmp_path / "log.jsonl")],
        log_every=2,
    )
    trainer.fit([stage for name in ("one", "<two>") for stage in (Train(), Evaluate(name=name))])
    return tmp_path


def test_the_page_shows_the_log(run: Path) -> None:
    page = write_report(run).read_text()
    parser = Parser()
    parser.feed(page)
    assert parser.open == []
    for title in (
        "Loss",
        "auc",
        "Samples/s",
        "Time of a step",
        "Rows of tables",
        "Memory",
        "id: 20 ids by frequency",
    ):
        assert title in parser.titles
    assert parser.polylines[0] == 8  # 16 steps, a log entry every second one
    assert "&lt;two&gt;" in page
    assert "<two>" not in page
    phases = re.findall(r"<title>(data|lookup|towers|update): ([\d.e-]+) ms on average", page)
    assert {name for name, _ in phases} == {"data", "lookup", "towers", "update"}
    assert all(float(milliseconds) > 0 for _, milliseconds in phases)


def test_the_page_is_self_contained(run: Path) -> None:
    page = write_report(run, run / "other.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<img|src=", page)


def test_truncated_logs_and_undefined_metrics_are_read(run: Path) -> None:
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({"event": "eval", "step": 16, "name": "one", "one/auc": None}) + "\n")
        file.write('{"event": "tr')
    assert "NaN" in write_report(run).read_text()
    (run / "log.jsonl").write_text("")
    with pytest.raises(ValueError, match="the log is empty"):
        write_report(run)


def test_ticks_are_within_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    for low, span in torch.rand(50, 2, generator=generator).double().tolist():
        low, high = low - 0.5, low - 0.5 + 10 ** (8 * span - 4)
        values = ticks(low, high)
        assert 2 <= len(values) <= 8
        assert all(low - 1e-6 * (high - low) <= value <= high * (1 + 1e-6) + 1e-6 for value in values)


def test_a_browser_renders_the_page(run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("chromium is not on PATH (apt-get install chromium)")
    command = [
        browser,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1280,2000",
        f"--screenshot={tmp_path / 'page.png'}",
        write_report(run).as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    from PIL import Image

    image = Image.open(tmp_path / "page.png").convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(-1, 3).int()
    # Lines, legends and areas use the first four colors of the style.
    for color in ((0x2F, 0x6F, 0xDE), (0xD9, 0x76, 0x2B), (0x2A, 0x9D, 0x6F), (0xB4, 0x48, 0x9A)):
        near = (pixels - torch.tensor(color)).abs().sum(1) < 12
        assert int(near.sum()) > 500, color
