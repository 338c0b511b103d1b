"""Mutants of ``scripts/mutants.py`` fit the sources, and a survivor fails the script; ``make mutants`` runs them."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def mutants(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", root / "scripts" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_mutant_changes_one_place_and_names_existing_tests(root: Path, mutants: ModuleType) -> None:
    for mutant in mutants.MUTANTS:
        assert (root / mutant.file).read_text().count(mutant.old) == 1, f"{mutant.name} no longer fits {mutant.file}"
    kernels = {kernel for mutant in mutants.MUTANTS for kernel in mutant.kernels}
    assert kernels <= {path.stem for path in (root / "csrc" / "cuda").glob("*.cu")}
    for name in {test for mutant in mutants.MUTANTS for test in mutant.tests}:
        file, _, function = name.partition("::")
        assert f"def {function.partition('[')[0]}(" in (root / file).read_text(), name
    assert all(set(mutant.tests) <= set(mutants.ALL) for mutant in mutants.MUTANTS)


@pytest.mark.parametrize(("how", "status"), [("a failure", 0), (None, 1)])
def test_a_survivor_fails_the_script(
    mutants: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str | None,
    status: int,
) -> None:
    (one, *_) = mutants.MUTANTS
    seen: list[str] = []

    def build(folder: Path) -> Path:
        seen.append((folder / one.file).read_text())
        target = folder / "build" / "emulated"
        target.mkdir(parents=True, exist_ok=True)
        for name in [*(f"{kernel}.o" for kernel in one.kernels), "librecis_emulated.so"]:
            (target / name).touch()
        return target / "librecis_emulated.so"

    monkeypatch.setattr(mutants, "MUTANTS", [dataclasses.replace(one, name="one")])
    monkeypatch.setattr(mutants, "build", build)
    monkeypatch.setattr(mutants, "failed_tests", lambda library, tests: how if len(seen) > 1 else None)
    monkeypatch.setattr(sys, "argv", ["mutants.py"])
    with pytest.raises(SystemExit) as ended:
        mutants.main()
    assert ended.value.code == status
    assert ("survived" if how is None else "caught") in capsys.readouterr().out
    assert one.old in seen[0]
    assert seen[1] == seen[0].replace(one.old, one.new)
