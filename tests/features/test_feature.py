from __future__ import annotations

import dataclasses
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recis_hybrid.features import (
    Age,
    Bucketize,
    Cross,
    DatePart,
    Feature,
    Hash,
    Length,
    Mask,
    Mod,
    MultiHash,
    MultiHot,
    OneHot,
    Pad,
    StringMultiHash,
    Tile,
    ToDense,
    TopK,
    Truncate,
    Vocabulary,
)


def test_the_default_source_is_the_column_of_the_same_name() -> None:
    assert Feature("user").columns == ("user",)
    assert Feature("user_small", source="user").columns == ("user",)


def test_repr_omits_defaults() -> None:
    assert repr(Feature("user")) == "Feature('user')"
    assert repr(Feature("x", ops=[Mod(3)], source="user", optional=True)) == (
        "Feature('x', ops=[Mod(n=3)], source='user', optional=True)"
    )
    assert repr(Feature("x", source=["a", Feature("b")])) == "Feature('x', source=['a', Feature('b')])"


def test_repr_of_a_vocabulary_has_its_size(tmp_path: Path) -> None:
    (tmp_path / "cities").write_text("rome\noslo\n")
    assert repr(Vocabulary([7, 8, 9], unknown=3)) == "Vocabulary(3 entries, unknown=3)"
    assert repr(Vocabulary(tmp_path / "cities")) == f"Vocabulary('{tmp_path}/cities', 2 entries, unknown=None)"


def test_features_compare_by_value() -> None:
    feature = Feature("user", ops=[Hash("murmur"), Mod(10)])
    assert feature.ops == (Hash("murmur"), Mod(10))
    assert feature == Feature("user", ops=(Hash("murmur"), Mod(10)), source="user")
    assert hash(feature) == hash(Feature("user", ops=[Hash("murmur"), Mod(10)]))
    assert feature != Feature("user", ops=[Hash("farm"), Mod(10)])
    with pytest.raises(FrozenInstanceError):
        feature.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": 3}, TypeError, "Feature 3: name must be a string, got int"),
        ({"name": ""}, ValueError, "Feature '': name must not be empty"),
        ({"name": "a", "source": 3}, TypeError, "Feature 'a': source must be a string, got int"),
        ({"name": "a", "source": ""}, ValueError, "Feature 'a': source must not be empty"),
        (
            {"name": "a", "ops": Mod(3)},
            TypeError,
            r"Feature 'a': ops must be a list .*got Mod\(n=3\); write ops=\[...\]",
        ),
        ({"name": "a", "ops": "hash"}, TypeError, "Feature 'a': ops must be a list of operations, got 'hash'"),
        ({"name": "a", "ops": [Mod(3), "hash"]}, TypeError, r"Feature 'a': ops\[1\] must be an operation .*got 'hash'"),
        ({"name": "a", "ops": [Hash]}, TypeError, r"Feature 'a': ops\[0\] must be an operation such as Hash\('farm'\)"),
    ],
)
def test_bad_features_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Feature(**arguments)


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (Hash("md5"), r"Hash: kind must be one of \['farm', 'murmur', 'xxh64', 'djb2', 'sdbm'\], got 'md5'"),  # type: ignore[arg-type]
        (Hash(["farm"]), r"Hash: kind must be one of .*, got \['farm'\]"),  # type: ignore[arg-type]
        (Mod(0), f"Mod: n must be an int from 1 to {2**64 - 1}, got 0; n is the number of distinct ids"),
        (Mod(-5), "Mod: n must be an int .*, got -5"),
        (Mod(2**64), f"Mod: n must be an int .*, got {2**64}"),
        (Mod(1.5), "Mod: n must be an int .*, got 1.5"),  # type: ignore[arg-type]
        (Mod(True), "Mod: n must be an int .*, got True"),
        (Bucketize([]), "Bucketize: boundaries must hold at least one number, got none"),
        (Bucketize([2, 1]), "Bucketize: boundaries must not decrease, got 2 and then 1 at 1; sort them"),
        (Bucketize([1.0, float("nan")]), "Bucketize: boundaries must be numbers, got NaN at 1; drop it"),
        (Bucketize([float("nan")]), "Bucketize: boundaries must be numbers, got NaN at 0"),
        (Bucketize(["1"]), "Bucketize: boundaries must be numbers, got '1' at 0"),  # type: ignore[list-item]
        (Bucketize([True]), "Bucketize: boundaries must be numbers, got True at 0"),
        (Bucketize(5), "Bucketize: boundaries must be a list of numbers, got 5"),  # type: ignore[arg-type]
    ],
)
def test_errors_of_bad_parameters_name_the_feature(op: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"Feature 'price': {message}"):
        Feature("price", ops=[op])


NO_INTEGERS: list[Any] = [2.0, 2.5, True, "2", np.float64(2), torch.tensor(2.5)]


@pytest.mark.parametrize(
    "make",
    [
        Mod,
        Truncate,
        Pad,
        ToDense,
        OneHot,
        MultiHot,
        Tile,
        TopK,
        Cross,
        Length,
        lambda n: MultiHash([n]),
        lambda n: Truncate(3, level=n),
        lambda n: Pad(3, level=n),
        lambda n: StringMultiHash([n], ["farm"]),
        lambda n: Vocabulary(["a", "b"], unknown=n),
        lambda n: DatePart("hour", missing=n),
        lambda n: Age(n),
    ],
)
def test_integer_settings_accept_only_integers(make: Any) -> None:
    for wrong in NO_INTEGERS:
        with pytest.raises(ValueError, match="Feature 'x': "):
            Feature("x", ops=[make(wrong)])
    for right in (2, np.int64(2), np.int32(2), np.uint8(2)):
        (op,) = Feature("x", ops=[make(right)]).ops
        assert op == make(2)
        assert all(not isinstance(getattr(op, field.name), np.integer) for field in dataclasses.fields(op))


def test_vocabularies_and_masks_accept_numpy_integers() -> None:
    assert Vocabulary(np.array([3, 5])) == Vocabulary([3, 5])
    assert Mask(np.array([3, 5])) == Mask([3, 5])
    with pytest.raises(ValueError, match="right must be True or False, got 1"):
        Feature("x", ops=[Bucketize([1], right=1)])  # type: ignore[arg-type]
