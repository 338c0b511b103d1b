from __future__ import annotations

import os
from pathlib import Path

import pytest

from recis_hybrid.columnio.files.paths import File, find_files


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.parquet",
        "a.parquet",
        "day=1/c.pq",
        "day=1/.c.pq.crc",
        "_temporary/d.parquet",
        "x.txt",
        "_SUCCESS",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def names(files: list[File], tree: Path) -> list[str]:
    return [str(Path(file.path).relative_to(tree)) for file in files]


def test_a_folder_yields_its_visible_files_by_name(tree: Path) -> None:
    assert names(find_files(tree), tree) == ["a.parquet", "b.parquet", "day=1/c.pq"]


def test_a_file_may_have_any_name(tree: Path) -> None:
    assert names(find_files(str(tree / "x.txt")), tree) == ["x.txt"]


def test_a_sequence_keeps_its_order(tree: Path) -> None:
    assert names(find_files([tree / "b.parquet", tree / "a.parquet"]), tree) == ["b.parquet", "a.parquet"]


def test_patterns(tree: Path) -> None:
    assert names(find_files(str(tree / "[ab].parquet")), tree) == ["a.parquet", "b.parquet"]
    assert names(find_files(str(tree / "day=*")), tree) == ["day=1/c.pq"]
    assert names(find_files(str(tree / "**" / "*.pq")), tree) == ["day=1/c.pq"]
    assert names(find_files(str(tree / "**" / "*.parquet")), tree) == ["a.parquet", "b.parquet"]
    assert names(find_files(str(tree / "_temporary" / "*.parquet")), tree) == ["_temporary/d.parquet"]


def test_missing_files_are_rejected(tree: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.parquet does not exist .*check the path"):
        find_files(tree / "none.parquet")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.txtx .*check the pattern"):
        find_files(str(tree / "*.txtx"))
    empty = tree / "empty"
    empty.mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"the folder .*empty has no file with a suffix of \.parquet, \.pq, \.orc, .* or "
    ):
        find_files(empty)


def test_invalid_paths_are_rejected(tree: Path) -> None:
    with pytest.raises(ValueError, match="at least one file, folder or pattern, got an empty sequence"):
        find_files([])
    with pytest.raises(ValueError, match="neither pyarrow nor fsspec has a file system for nothing://bucket/x"):
        find_files("nothing://bucket/x")
    with pytest.raises(ValueError, match=r"a\.parquet is named twice, so its rows would be read twice"):
        find_files([tree, tree / "a.parquet"])


def test_a_link_to_a_named_file_is_the_same_file(tree: Path) -> None:
    os.symlink(tree / "a.parquet", tree / "link")
    with pytest.raises(ValueError, match="named twice"):
        find_files([tree / "a.parquet", tree / "link"])
