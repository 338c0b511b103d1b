from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, strategies as st

from recis_hybrid import ops
from tests.support import emulated, hashes
from tests.support.devices import EDGE_IDS, on_accelerators, on_devices

REFERENCE: dict[str, Callable[[bytes], int]] = {
    name: getattr(hashes, name) for name in ("farm", "murmur", "xxh64", "djb2", "sdbm")
}
kinds = pytest.mark.parametrize("kind", list(REFERENCE))
BAD = [[0, 5, 3], [0, 3, 11], [-1, 3], [2**62, -(2**62)]]

# Strings of n bytes 11, 48, 85, ... (in steps of 37): n, the fingerprint64 of PyPI's pyfarmhash 0.5.1, and the
# _Hash_bytes(data, n, 0) of GNU libstdc++, which is MurmurHash64A. Lengths of each class and at each boundary.
PINNED = [
    (0, -7286425919675154353, 0),
    (1, 4787810249829893994, 962983613142996970),
    (2, -5870238476649483149, -3305949327679089480),
    (3, 3979540680440595841, -1478875638935536825),
    (4, -3738419243802268311, -8763332555535293705),
    (7, -7635790514182567563, -8946727642000623204),
    (8, 9029840561075318013, 3519427778780009695),
    (12, 1342307080078500921, 5929912374931765412),
    (16, -2867024934404000554, -6974282791290782775),
    (17, 6692022265393568454, -1480014138247209755),
    (32, -6903172834462372441, -1095096623372374645),
    (33, -8966292154821290346, 7185063428954018095),
    (64, 4226431515964725, 6926387766666406854),
    (65, -345074783107019338, 7448664527058346320),
    (127, -2950362913674212092, -5254540757455709227),
    (128, 3742283891066476345, 2937446189961229224),
    (129, -4392555866925898531, -1030111996104837036),
    (192, -2127996258368692957, -5938848966929350527),
    (300, 8075393831970212021, 7705997362120210573),
]


def column(strings: list[bytes], device: str = "cpu", shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return strings as values and offsets; the values start ``shift`` bytes into their memory."""
    joined = bytearray(bytes(shift) + b"".join(strings) + b"x")
    values = torch.frombuffer(joined, dtype=torch.uint8).to(device)[shift:-1]
    lengths = torch.tensor([0, *map(len, strings)], dtype=torch.int64)
    return values, lengths.cumsum(0).to(device)


@on_devices
def test_known_values(device: str) -> None:
    values, offsets = column([bytes([0, 1, 2]), bytes([5, 6, 7])], device)
    assert ops.hash.hash_bytes(values, offsets, "farm").tolist() == [-7736835464683084646, -909183002746659612]
    assert ops.hash.hash_bytes(values, offsets, "murmur").tolist() == [-4003751876240412087, 4434088491466393040]
    crossed = (1001).to_bytes(8, "little") + (1).to_bytes(8, "little")
    assert ops.hash.hash_bytes(*column([crossed], device), "murmur").tolist() == [-7808879811642834040]


@on_devices
@pytest.mark.parametrize(("kind", "which"), [("farm", 1), ("murmur", 2)])
def test_agreement_with_other_implementations(device: str, kind: ops.hash.HashKind, which: int) -> None:
    strings = [bytes((i * 37 + 11) & 255 for i in range(row[0])) for row in PINNED]
    want = [row[which] for row in PINNED]
    assert ops.hash.hash_bytes(*column(strings, device), kind).tolist() == want
    assert [REFERENCE[kind](string) for string in strings] == want


@on_devices
@kinds
@pytest.mark.parametrize("shift", range(8))
def test_every_length_at_every_alignment(device: str, kind: ops.hash.HashKind, shift: int) -> None:
    generator = torch.Generator().manual_seed(shift)
    strings = [
        bytes(torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator).tolist()) for n in [*range(140), 1000]
    ]
    want = [REFERENCE[kind](string) for string in strings]
    assert ops.hash.hash_bytes(*column(strings, device, shift), kind).tolist() == want


@kinds
@given(strings=st.lists(st.binary(max_size=300), max_size=8))
def test_any_strings(kind: ops.hash.HashKind, strings: list[bytes]) -> None:
    assert ops.hash.hash_bytes(*column(strings), kind).tolist() == [REFERENCE[kind](string) for string in strings]


@on_devices
@kinds
def test_no_strings_and_empty_strings(device: str, kind: ops.hash.HashKind) -> None:
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    none = ops.hash.hash_bytes(nothing, torch.zeros(1, dtype=torch.int64, device=device), kind)
    assert (none.shape, none.dtype, none.device) == ((0,), torch.int64, nothing.device)
    three = ops.hash.hash_bytes(nothing, torch.zeros(4, dtype=torch.int64, device=device), kind)
    assert three.tolist() == [REFERENCE[kind](b"")] * 3


@on_devices
@kinds
def test_rows_may_cover_only_part_of_the_bytes(device: str, kind: ops.hash.HashKind) -> None:
    values, offsets = column([b"left", b"out", b"hash", b"these", b"not"], device)
    want = [REFERENCE[kind](string) for string in (b"hash", b"these")]
    assert ops.hash.hash_bytes(values, offsets[2:5], kind).tolist() == want
    strided = torch.stack([values, values], 1)[:, 0]
    assert ops.hash.hash_bytes(strided, offsets[2:5], kind).tolist() == want


@kinds
def test_many_rows_with_several_threads(kind: ops.hash.HashKind) -> None:
    strings = [b"%d" % i for i in range(20_000)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.hash.hash_bytes(*column(strings), kind))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert results[0][::997].tolist() == [REFERENCE[kind](string) for string in strings[::997]]


@on_devices
@kinds
def test_an_id_is_hashed_as_its_eight_bytes(device: str, kind: ops.hash.HashKind) -> None:
    want = [REFERENCE[kind](i.to_bytes(8, "little", signed=True)) for i in EDGE_IDS]
    ids = torch.tensor(EDGE_IDS, device=device)
    assert ops.hash.hash_ids(ids, kind).tolist() == want
    grid = ids.view(2, 4).t()
    assert torch.equal(ops.hash.hash_ids(grid, kind), torch.tensor(want, device=device).view(2, 4).t())
    assert ops.hash.hash_ids(ids[:0].view(0, 3), kind).shape == (0, 3)


@kinds
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_any_ids(kind: ops.hash.HashKind, ids: list[int]) -> None:
    want = [REFERENCE[kind](i.to_bytes(8, "little", signed=True)) for i in ids]
    assert ops.hash.hash_ids(torch.tensor(ids, dtype=torch.int64), kind).tolist() == want


@kinds
@pytest.mark.parametrize("offsets", BAD)
def test_bad_offsets_are_refused(kind: ops.hash.HashKind, offsets: list[int]) -> None:
    with pytest.raises(RuntimeError, match="decrease or lie outside the 10 bytes"):
        ops.hash.hash_bytes(torch.zeros(10, dtype=torch.uint8), torch.tensor(offsets), kind)


def test_the_row_of_bad_offsets_is_reported() -> None:
    offsets = torch.arange(5_001)
    offsets[4_321] = 0
    with pytest.raises(RuntimeError, match="row 4320 "):
        ops.hash.hash_bytes(torch.zeros(5_000, dtype=torch.uint8), offsets)


@on_accelerators
@kinds
@pytest.mark.parametrize("offsets", BAD)
def test_an_accelerator_reports_bad_offsets_later(device: str, kind: ops.hash.HashKind, offsets: list[int]) -> None:
    values = torch.zeros(10, dtype=torch.uint8, device=device)
    good = torch.tensor([0, 3, 10], device=device)
    expected = ops.hash.hash_bytes(values.cpu(), good.cpu(), kind)
    refused = ops.hash.hash_bytes(values, torch.tensor(offsets, device=device), kind)
    torch.accelerator.synchronize()
    with pytest.raises(RuntimeError, match=r"hash_bytes: offsets decrease or lie outside the bytes: element \d of an"):
        ops.hash.hash_bytes(values, good, kind)
    assert int(refused[-1]) == 0
    # The device works as before, and an error is raised once.
    assert torch.equal(ops.hash.hash_bytes(values, good, kind).cpu(), expected)
    ops.faults.check()


@on_accelerators
def test_the_check_waits_for_the_accelerator(device: str) -> None:
    values = torch.zeros(5_000, dtype=torch.uint8, device=device)
    offsets = torch.arange(5_001)
    offsets[4_321] = 0
    ops.hash.hash_bytes(values, offsets.to(device))
    with pytest.raises(RuntimeError, match="element 4320 of an earlier call on "):
        ops.faults.check()
    ops.faults.check()


@pytest.mark.emulated
@pytest.mark.parametrize("how", [1, 2])
def test_late_streams_report_late(how: int) -> None:
    values = torch.zeros(10, dtype=torch.uint8, device="emulated")
    good, bad = (torch.tensor(offsets, device="emulated") for offsets in ([0, 3, 10], [0, 5, 3]))
    ops.hash.hash_bytes(values, good)
    side = torch.Stream(values.device)
    with emulated.schedule(late=how):
        emulated.clear_counts()
        with side:
            ops.hash.hash_bytes(values, bad)
        results = [ops.hash.hash_bytes(values, good) for _ in range(3)]  # nothing has run yet
        assert emulated.counts()["synchronizations"] == emulated.counts()["copies_from_device"] == 0
        side.synchronize()
        with pytest.raises(RuntimeError, match="element 1 of an earlier call"):
            ops.hash.hash_bytes(values, good)
        with side:
            ops.hash.hash_bytes(values, torch.tensor([-1, 3], device="emulated"))
        with pytest.raises(RuntimeError, match="element 0 of an earlier call"):
            ops.faults.check()
    assert all(torch.equal(result, results[0]) for result in results)


@on_devices
def test_offsets_after_the_strings_in_use_may_be_bad(device: str) -> None:
    values = torch.zeros(10, dtype=torch.uint8, device=device)
    offsets, used = torch.tensor([0, 3, 10, -7, 99], device=device), torch.tensor([0, 2], device=device)
    found = ops.hash.hash_bytes(values, offsets, used=used)
    ops.faults.check()
    assert found[:2].tolist() == ops.hash.hash_bytes(values, offsets[:3]).tolist()
    ops.hash.hash_bytes(values, offsets, used=used + 1) if device != "cpu" else None
    with pytest.raises(RuntimeError, match="hash_bytes: .*offsets"):
        ops.faults.check() if device != "cpu" else ops.hash.hash_bytes(values, offsets, used=used + 1)


@on_accelerators
def test_an_accelerator_needs_a_word_for_faults(device: str) -> None:
    values, offsets = column([b"ab"], device)
    with pytest.raises(RuntimeError, match="faults must hold the address of a word"):
        torch.ops.recis.hash_bytes(values, offsets, 0)


@on_devices
def test_a_compiled_hash(device: str) -> None:
    values, offsets = column([b"ab", b"c"], device)
    compiled = torch.compile(lambda v, o: ops.hash.hash_bytes(v, o), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values, offsets), ops.hash.hash_bytes(values, offsets))
    if device != "cpu":
        compiled(values, offsets.flip(0))
        with pytest.raises(RuntimeError, match="hash_bytes: offsets decrease"):
            ops.faults.check()


def test_bad_arguments_are_refused() -> None:
    values, offsets = column([b"ab"])
    with pytest.raises(TypeError, match="uint8 and offsets int64, got torch.int64 and torch.int64"):
        ops.hash.hash_bytes(offsets, offsets)
    with pytest.raises(TypeError, match="got torch.uint8 and torch.int32"):
        ops.hash.hash_bytes(values, offsets.int())
    with pytest.raises(ValueError, match=r"got \[1, 2\] and \[2\]"):
        ops.hash.hash_bytes(values.view(1, 2), offsets)
    with pytest.raises(ValueError, match=r"got \[2\] and \[0\]"):
        ops.hash.hash_bytes(values, offsets[:0])
    with pytest.raises(ValueError, match="got cpu and meta"):
        ops.hash.hash_bytes(values, offsets.to("meta"))
    with pytest.raises(ValueError, match=r"one of \['farm', 'murmur', .*\], got 'md5'"):
        ops.hash.hash_bytes(values, offsets, "md5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be int64, got torch.int32"):
        ops.hash.hash_ids(offsets.int())
    with pytest.raises(ValueError, match="got 'sha'"):
        ops.hash.hash_ids(offsets, "sha")  # type: ignore[arg-type]
    # Native checks, for direct calls of the operators.
    with pytest.raises(RuntimeError, match="unknown kind of hash: 5"):
        torch.ops.recis.hash_ids(offsets, 5)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        torch.ops.recis.hash_ids(torch.zeros(4, 2, dtype=torch.int64).t(), 0)


@on_devices
@pytest.mark.parametrize("kind", range(5))
def test_schemas_and_fakes_of_operators(device: str, kind: int) -> None:
    values, offsets = column([b"a", b"", b"bcd"], device)
    used, word = torch.tensor([2], device=device), ops.faults.words(values, "test")
    torch.library.opcheck(torch.ops.recis.hash_bytes.default, (values, offsets, kind, used, word))
    torch.library.opcheck(torch.ops.recis.hash_ids.default, (offsets.view(2, 2), kind))
