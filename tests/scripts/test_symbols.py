"""Versions of symbols that the libraries for the CPU need: none that manylinux_2_28 lacks."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

# Of the policy manylinux_2_28 of auditwheel; GLIBCXX and CXXABI are those of GCC 8.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}
# Functions of later versions of libstdc++. They have no version if a library takes them from another one by chance.
LATER = ("throw_bad_array_new_lengthv", "exception_ptr9_M_addrefEv", "exception_ptr10_M_releaseEv")
# Were they compiled into the library, those that call them there would call themselves.
OWN_COPY = ("exception_ptrC1ERKS0_", "exception_ptrD1Ev")


def libraries(root: Path) -> list[Path]:
    package = root / "recis_hybrid"
    # The static CUDA runtime takes the versions of the machine that links it: build wheels with CUDA on an old one.
    return [*package.glob("lib/librecis_cpu_*.so"), *package.glob("_xla.*.so")]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the versions are those of x86-64")
def test_libraries_run_on_manylinux_2_28(root: Path) -> None:
    found = libraries(root)
    assert len(found) >= 3
    for path in found:
        with path.open("rb") as file:
            elf = ELFFile(file)
            table, versions = elf.get_section_by_name(".dynsym"), elf.get_section_by_name(".gnu.version_r")
            assert isinstance(table, SymbolTableSection)
            assert isinstance(versions, GNUVerNeedSection)
            needed = {version.name for _, of_library in versions.iter_versions() for version in of_library}
            symbols = list(table.iter_symbols())
        too_new = [
            name
            for name, _, number in (version.rpartition("_") for version in needed)
            if tuple(map(int, number.split("."))) > NEWEST[name]
        ]
        assert too_new == [], path.name
        undefined = [symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF"]
        defined = [symbol.name for symbol in symbols if symbol["st_shndx"] != "SHN_UNDEF"]
        assert [name for name in undefined if name.endswith(LATER)] == [], path.name
        assert [name for name in defined if name.endswith(OWN_COPY)] == [], path.name
