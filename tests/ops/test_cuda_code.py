"""Memory accesses, registers and stack of the CUDA kernels that move most bytes, by the PTX of one architecture."""

from __future__ import annotations

import re

import pytest

from tests.support import ptx

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(ptx.reason_to_skip()), reason=ptx.reason_to_skip() or "none"),
]

FIELDS = {
    "AdagradRule": 2,
    "AdagradSumRule": 2,
    "AdamL2Rule<false>": 3,
    "AdamL2Rule<true>": 4,
    "AdamRule": 3,
    "AssignRule": 1,
    "FtrlRule": 3,
    "LambRule": 3,
    "LionRule": 2,
    "MomentumRule": 2,
    "RmspropRule": 2,
    "RowwiseAdagradRule": 1,
    "RowwiseAdamRule": 2,
    "SgdRule": 1,
}
"""Parts of a record that a rule edits element by element."""


@pytest.fixture(scope="module")
def kernels() -> dict[str, ptx.Kernel]:
    return ptx.kernels()


def of_tiles(kernels: dict[str, ptx.Kernel], start: str) -> dict[str, ptx.Kernel]:
    """Return the kernels that move tiles of four elements."""
    found = {name: kernel for name, kernel in kernels.items() if name.startswith(start) and re.search(r"\b4>$", name)}
    assert found
    return found


def test_updates_move_each_field_by_one_access(kernels: dict[str, ptx.Kernel]) -> None:
    for name, kernel in of_tiles(kernels, "UpdateRows").items():
        match = re.fullmatch(r"UpdateRows<(\w+)(<\w+>)?, (\w+), (\w+), 4>", name)
        assert match is not None, name
        rule, types = match[1], match.groups()[2:]
        fields = FIELDS.get(f"{rule}{match[2]}") or FIELDS[rule]
        sizes = [4 * (4 if kind == "float" else 2) for kind in (types[0], *(types[1:] * (fields - 1)))]
        # A kernel has several copies of its loops, but each of them moves whole tiles.
        for size in set(sizes):
            assert kernel.stores.count(size) >= sizes.count(size), name
        assert 16 in kernel.loads, name
        narrow = {4} if rule.startswith("Rowwise") else set()
        assert set(kernel.stores) - narrow <= {8, 16}, name


def test_gradients_are_read_and_written_by_16_bytes(kernels: dict[str, ptx.Kernel]) -> None:
    for start in ("ReduceRows", "SumChunks"):
        for name, kernel in of_tiles(kernels, start).items():
            assert 16 in kernel.loads, name
            assert set(kernel.stores) == {16}, name


def test_gathering_moves_whole_tiles(kernels: dict[str, ptx.Kernel]) -> None:
    for name, kernel in of_tiles(kernels, "GatherBags").items():
        assert set(kernel.stores) == {16}, name
        assert (16 if "<float" in name else 8) in kernel.loads, name


def test_tiles_are_never_moved_by_bytes_nor_spilled(kernels: dict[str, ptx.Kernel]) -> None:
    for start in ("GatherBags", "ReduceRows", "SumChunks", "UpdateRows"):
        for name, kernel in of_tiles(kernels, start).items():
            assert 1 not in kernel.elements, name
            assert kernel.spills == 0, name


def test_probes_read_a_slot_by_one_access(kernels: dict[str, ptx.Kernel]) -> None:
    for name in ("FindIds<false>", "FindIds<true>", "FindOrInsertIds", "CountIds", "AdmitCounted"):
        assert 16 in kernels[name].loads, name


def test_cached_records_move_by_16_bytes(kernels: dict[str, ptx.Kernel]) -> None:
    for name, others in (("ClaimWays", {4}), ("WriteBackWays", {8})):  # the tag or the state of a way
        assert 16 in kernels[name].loads, name
        assert set(kernels[name].stores) == {16, *others}, name
    for name in ("TouchRows", "LocateRows<false>", "LocateRows<true>"):
        assert 16 in kernels[name].loads, f"{name}: tags"


def test_registers_and_stack_are_those_of_the_table(kernels: dict[str, ptx.Kernel]) -> None:
    version, table = ptx.read_table()
    found = {name: (kernel.registers, kernel.stack) for name, kernel in kernels.items()}
    if version == ptx.version():
        assert found == table, "if the change is wanted: python -m tests.support.ptx"
        return
    assert found.keys() == table.keys()
    for name, (registers, stack) in found.items():
        assert registers <= 1.25 * table[name][0] + 8, name
        assert stack <= table[name][1] + 64, name
