from __future__ import annotations

import pytest

from recis_hybrid.features import Bucketize, Feature, FeatureEngine, Hash, Mod


def test_equal_operations_on_equal_inputs_occur_once() -> None:
    plan = FeatureEngine(
        [
            Feature("a", ops=[Hash(), Mod(10)], source="user"),
            Feature("b", ops=[Hash(), Mod(20)], source="user"),
            Feature("c", ops=[Hash(), Mod(10)], source="user"),
            Feature("d", ops=[Hash(), Mod(10)], source="item"),
            Feature("e", ops=[Mod(10)], source="user"),
            Feature("f", ops=[Hash("murmur"), Mod(10)], source="user"),
        ]
    ).plan
    lines = [(str(line.op), line.sources[0]) for line in plan.instructions]
    assert lines == [
        ("hash[farm]", 0),
        ("mod[10]", 2),
        ("mod[20]", 2),
        ("hash[farm]", 1),
        ("mod[10]", 5),
        ("mod[10]", 0),
        ("hash[murmur]", 0),
        ("mod[10]", 8),
    ]
    assert plan.outputs == {"a": 3, "b": 4, "c": 3, "d": 6, "e": 7, "f": 9}
    assert plan.columns == {"user": ("a", "b", "c", "e", "f"), "item": ("d",)}
    assert [line.features for line in plan.instructions[:3]] == [("a", "b", "c"), ("a", "c"), ("b",)]


def test_an_operation_may_be_repeated_in_a_chain() -> None:
    plan = FeatureEngine([Feature("a", ops=[Hash(), Hash(), Hash()])]).plan
    assert [line.sources for line in plan.instructions] == [(0,), (1,), (2,)]
    assert plan.outputs == {"a": 3}


def test_operations_follow_their_inputs() -> None:
    plan = FeatureEngine([Feature(str(n), ops=[Hash(), Mod(n), Bucketize([n])], source="x") for n in range(1, 9)]).plan
    for register, line in enumerate(plan.instructions, len(plan.columns)):
        assert max(line.sources) < register


def test_explain_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FeatureEngine(
        [
            Feature("age"),
            Feature("decade", ops=[Bucketize([20, 30, 40])], source="age"),
            Feature("user", ops=[Hash(), Mod(100)]),
            Feature("member", ops=[Hash(), Mod(100)], source="user"),
        ]
    )
    engine.explain()
    printed = capsys.readouterr().out
    assert printed == str(engine.plan) + "\n"
    assert [" ".join(line.split()) for line in printed.splitlines()] == [
        "features: 4, columns read: 2, operations: 3 (and 2 equal to one of them)",
        "%0 = column 'age' -> 'age'",
        "%1 = column 'user'",
        "%2 = bucketize[3 boundaries] %0 -> 'decade'",
        "%3 = hash[farm] %1",
        "%4 = mod[100] %3 -> 'user', 'member'",
        "all other columns pass through",
    ]


def test_names_of_features_must_be_distinct() -> None:
    with pytest.raises(
        ValueError, match=r"FeatureEngine: features must have distinct names, \['a'\] occur more than once"
    ):
        FeatureEngine([Feature("a"), Feature("b"), Feature("a", source="b")])


def test_only_features_are_accepted() -> None:
    with pytest.raises(TypeError, match="features must be a list of Features, got the element 'user'"):
        FeatureEngine(["user"])  # type: ignore[list-item]
