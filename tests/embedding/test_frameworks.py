"""The code in docs/frameworks.md runs and does what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.near import assert_near
from tests.support.sharded import rows_of

pytestmark = [
    # Raised by Lightning, Accelerate and their dependencies.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # raised by torch.compile
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
]


@pytest.fixture
def page(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a function that runs the first and other sections of the page and returns the names they define."""
    monkeypatch.chdir(tmp_path)
    text = (root / "docs" / "frameworks.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)

    def run(*titles: str) -> dict[str, Any]:
        torch.manual_seed(0)
        names: dict[str, Any] = {"__name__": "page"}
        for title in ("# With", *titles):
            (section,) = [section for section in sections if section.startswith(title)]
            for block in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
                exec(compile(block, "docs/frameworks.md", "exec"), names)
        return names

    yield run
    torch._dynamo.reset()


def assert_same(a: Any, b: Any) -> None:
    """Compare rows, including their optimizer state, and towers."""
    assert a.engine.tables[0].step == b.engine.tables[0].step
    for name, columns in rows_of(a.engine).items():
        for column, values in columns.items():
            assert torch.equal(values, rows_of(b.engine)[name][column]), (name, column)
    assert all(map(torch.equal, a.tower.parameters(), b.tower.parameters()))


def predictions(ranker: Any, names: dict[str, Any]) -> torch.Tensor:
    ranker.eval()
    with torch.no_grad():
        return ranker(names["batches"][3])  # type: ignore[no-any-return]


def test_state_dict_and_export(page: Any) -> None:
    names = page("state_dict", "torch.export")
    assert_same(names["restored"], names["model"])
    assert len(names["model"].engine.tables[0]) > 50
    expected = predictions(names["model"], names)
    found = names["model"].engine(names["batches"][3])
    got = names["exported"].module()(torch.cat([found["user"], found["items"]], 1))[:, 0]
    assert_near(got, expected)


def test_compiled_towers(page: Any) -> None:
    names = page("torch.compile")
    assert torch.isfinite(names["compiled"](names["batches"][0])).all()


def test_lightning(page: Any) -> None:
    pytest.importorskip("lightning", reason="the recipe is for Lightning; requirements/dev.txt has it")
    with pytest.warns(UserWarning, match="rows of embedding tables are not in the state_dict"):
        names = page("Lightning")
    assert_same(names["scorer"].ranker, names["module"].ranker)
    uninterrupted = names["LightningRanker"]()
    continued = names["continued"].ranker  # everything is from the checkpoint, so initial weights need not match
    names["lightning_trainer"](1).fit(uninterrupted, names["loader"])
    names["lightning_trainer"](2).fit(uninterrupted, names["loader"], ckpt_path="lightning.ckpt", weights_only=True)
    assert_same(continued, uninterrupted.ranker)
    assert continued.engine.tables[0].step == 2 * len(names["batches"])
    restored, saved = names["scorer_with_saver"].ranker, names["with_saver"].ranker
    assert_same(restored, saved)
    assert torch.equal(predictions(restored, names), predictions(saved, names))


def test_a_lightning_checkpoint_without_rows_is_refused(page: Any) -> None:
    pytest.importorskip("lightning", reason="the recipe is for Lightning; requirements/dev.txt has it")
    with pytest.warns(UserWarning, match="rows of embedding tables"):
        names = page("Lightning")
    trainer, module = names["lightning_trainer"](1), names["LightningRanker"](None)
    trainer.fit(module, names["loader"])
    with pytest.warns(UserWarning, match="save them with recis_hybrid.saver.Saver"):
        trainer.save_checkpoint("none.ckpt")
    with pytest.raises(RuntimeError, match=r"ranker.engine.tables \(its \d+ rows are not in the state_dict"):
        names["LightningRanker"].load_from_checkpoint("none.ckpt", weights_only=True)


def test_accelerate(page: Any) -> None:
    pytest.importorskip("accelerate", reason="the recipe is for Accelerate; requirements/dev.txt has it")
    names = page("Accelerate")
    first, second = names["first"][1], names["second"][1]
    assert_same(first, second)
    assert first.engine.tables[0].step == 2 * len(names["batches"])


def test_an_accelerate_state_without_rows_is_refused(page: Any) -> None:
    pytest.importorskip("accelerate", reason="the recipe is for Accelerate; requirements/dev.txt has it")
    names = page("Accelerate")
    accelerator, model, *_ = names["first"]
    model.engine.rows_in_state_dict = None
    with pytest.warns(UserWarning, match="save them with recis_hybrid.saver.Saver"):
        accelerator.save_state("none")
    with pytest.raises(
        RuntimeError, match=r"engine.tables \(its \d+ rows are not in the state_dict, and the tables are empty"
    ):
        names["accelerated"]()[0].load_state("none")
