"""Values computed by RecIS, so that models trained there keep their ids."""

from __future__ import annotations

import torch

from recis_hybrid.features import Bucketize, Cross, Feature, FeatureEngine, Hash, Mod, MultiHash, StringMultiHash
from recis_hybrid.features.ops.primes import is_prime
from recis_hybrid.ragged import RaggedTensor
from tests.support import hashes
from tests.support.devices import on_devices
from tests.support.features import fused_or_not

STRINGS = RaggedTensor(torch.tensor([0, 1, 2, 5, 6, 7], dtype=torch.uint8), torch.tensor([0, 3, 6]))


def compute(feature: Feature, fuse: bool, **columns: torch.Tensor | RaggedTensor) -> dict[str, list[int]]:
    batch = FeatureEngine([feature], fuse=fuse)(columns)
    return {name: column.tolist() for name, column in batch.items() if isinstance(column, torch.Tensor)}


@fused_or_not
@on_devices
def test_hashes_of_bytes(device: str, fuse: bool) -> None:
    strings = STRINGS.to(device)
    assert compute(Feature("s", ops=[Hash("farm")]), fuse, s=strings) == {
        "s": [-7736835464683084646, -909183002746659612]
    }
    assert compute(Feature("s", ops=[Hash("murmur")]), fuse, s=strings) == {
        "s": [-4003751876240412087, 4434088491466393040]
    }


@fused_or_not
@on_devices
def test_cross(device: str, fuse: bool) -> None:
    x, y = torch.tensor([1001], device=device), torch.tensor([1], device=device)
    assert compute(Feature("x", ops=[Cross()], source=["a", "b"]), fuse, a=x, b=y) == {"x": [-7808879811642834040]}


@fused_or_not
@on_devices
def test_multi_hash(device: str, fuse: bool) -> None:
    ids = torch.tensor([1001, 1002, 1003], device=device)
    want = {"m_0": [1, 2, 3], "m_1": [3, 6, 9], "m_2": [5, 10, 15], "m_3": [7, 14, 21]}
    assert compute(Feature("m", ops=[MultiHash([1000] * 4)]), fuse, m=ids) == want


@fused_or_not
def test_multi_hash_of_any_ids_matches_the_formula(fuse: bool) -> None:
    ids = [0, 1, -1, 2**63 - 1, -(2**63), 10**18, -(10**18), 12345]
    got = compute(Feature("m", ops=[MultiHash([1000, 7, 2**31, 1])]), fuse, m=torch.tensor(ids))
    for which, buckets in enumerate([1000, 7, 2**31, 1]):
        prime = next(n for n in range([29, 47, 67, 83][which] * buckets, 0, -1) if is_prime(n))
        products = [hashes.signed(i * [1, 3, 5, 7][which] % 2**64) for i in ids]
        # Python's % is never negative, as ((v % p) + p) % p is not.
        assert got[f"m_{which}"] == [product % prime % buckets for product in products]


@fused_or_not
def test_mod_is_unsigned(fuse: bool) -> None:
    assert compute(Feature("m", ops=[Mod(10)]), fuse, m=torch.tensor([12, -1])) == {"m": [2, (2**64 - 1) % 10]}


@fused_or_not
def test_a_value_on_a_boundary_belongs_to_the_upper_bucket(fuse: bool) -> None:
    assert compute(Feature("b", ops=[Bucketize([18, 65])]), fuse, b=torch.tensor([17.0, 18.0, 65.5])) == {
        "b": [0, 1, 2]
    }


@fused_or_not
def test_string_multi_hash(fuse: bool) -> None:
    words = [b"", b"a", "é".encode(), b"x" * 40]
    got = compute(Feature("w", ops=[StringMultiHash([None, 10, None, 7])]), fuse, w=RaggedTensor.from_strings(words))
    assert got == {
        "w_0": [hashes.farm(word) for word in words],
        "w_1": [hashes.murmur(word) % 2**64 % 10 for word in words],
        "w_2": [hashes.djb2(word) for word in words],
        "w_3": [hashes.sdbm(word) % 2**64 % 7 for word in words],
    }


def test_a_string_has_the_same_id_in_the_reader_and_in_the_engine() -> None:
    engine = FeatureEngine([Feature("s", ops=[Hash(), Mod(1000)])])
    batch = {"s": RaggedTensor.from_strings(["ann", "bob", ""])}
    whole, split = engine(batch), engine.remaining_part()(engine.reading_part()(batch))
    assert torch.equal(whole["s"], split["s"])  # type: ignore[arg-type]
    assert FeatureEngine([Feature("s", ops=[Hash()])], fuse=False)(batch)["s"].tolist() == [  # type: ignore[union-attr]
        hashes.farm(string) for string in (b"ann", b"bob", b"")
    ]


def test_primes() -> None:
    sieve = [n for n in range(2, 2000) if all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(2000) if is_prime(n)] == sieve
    assert is_prime(2**61 - 1)
    assert not is_prime(3215031751)  # a strong pseudoprime to 2, 3, 5 and 7
