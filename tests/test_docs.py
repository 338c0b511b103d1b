"""Completeness of the documentation: navigation, links, file names, rooms. ``make docs`` builds it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.imports import read_package
from tests.support.near import assert_near

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
CODE = re.compile(r"^```.*?^```$|^    [^\n]*$", re.MULTILINE | re.DOTALL)  # fenced and indented


def navigation() -> set[str]:
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    return {line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")}


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES}
    assert navigation() == pages - {"index"}


def test_every_room_has_a_page_in_the_reference() -> None:
    packages = {source.module for source in read_package(ROOT) if source.is_package}
    rooms = {name for name in packages if name.count(".") == 1} - {"recis_hybrid.ops"}
    named = set(re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in PAGES)))
    assert rooms <= named


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_file_names_exist(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert (path.parent / link).exists(), link
    # Files and folders of the repository that are mentioned without a link.
    for named in re.findall(r"`((?:docs|examples|benchmarks|scripts|requirements|csrc|tests)/[\w./]+)`", text):
        assert (ROOT / named).exists(), named


def sections(text: str) -> list[tuple[int, str]]:
    """Return level and text of the sections, the code apart."""
    prose = CODE.sub("", text)
    parts = re.split(r"^(#+) .*$", prose, flags=re.MULTILINE)
    return [(len(marks), body) for marks, body in zip(parts[1::2], parts[2::2], strict=True)]


def test_the_chinese_readme_is_in_step() -> None:
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    assert [level for level, _ in sections(chinese)] == [level for level, _ in sections(english)]
    for (_, theirs), (_, ours) in zip(sections(chinese), sections(english), strict=True):
        # Figures, names in code and links are the same in each section; their order depends on the language.
        for pattern in (r"\d[\d,.]*\d|\d", r"`[^`]+`", r"\]\(([^)]+)\)", r"\w+/[\w/]+\.\w+", r"^(?:\||- |!)"):
            found, expected = (sorted(re.findall(pattern, text, re.MULTILINE)) for text in (theirs, ours))
            if "README.md" in found:  # the link to the other language
                found.remove("README.md")
                expected.remove("README.zh.md")
            assert found == expected
    assert CODE.findall(chinese) == CODE.findall(english)


@pytest.mark.jax
def test_the_code_blocks_on_jax_towers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("jax", "flax", "equinox", "orbax.checkpoint"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "jax_towers.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "docs/jax_towers.md", "exec"), names)
    assert {name: tuple(each.shape) for name, each in names["outputs"].items()} == dict.fromkeys(
        names["towers"], (4, 1)
    )
    # Padding does not change the mean, and one program has computed all sizes.
    assert names["sizes"] == [(40, 1), (64, 1), (50, 1)]
    assert names["pooled"].compilations == 1


@pytest.mark.jax
def test_the_code_blocks_of_the_jax_page_run() -> None:
    pytest.importorskip("jax", reason="jax is not installed")
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / "jax_led.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, "docs/jax_led.md", "exec"), names)
    assert sum(names["losses"][-10:]) < 0.5 * sum(names["losses"][:10])
    assert names["losses_inside"][-10:].sum() < 0.5 * names["losses_inside"][:10].sum()
    assert names["figures"]["eval"]["auc"] > 0.9
    assert len(names["ranker"].tables[0]) == 9
    assert_near(names["scores"], names["trained"].score(names["asked"])[""])
    assert names["bucket"].tolist() == [0, 1, 2]
    assert_near(names["pooled_gradient"][:, 0].tolist(), [(1 - math.tanh(1) ** 2) / n for n in (2, 2, 3, 3, 3)])
